"""TRPO's step on hfpg's own learner: Fisher products, the trust region, what happens when a search fails."""

import copy
import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hfpg import ConfigError
from hfpg.algorithms import TRPO
from hfpg.models import ActorCritic, Reference
from hfpg.natural import TrustRegion, choose_fisher, natural_step
from tests import build, tiny
from tests.oracle.world import World, error


def credited(world: World, algorithm: TRPO, rollout=None):
    """(rollout, credit, loss) of one step."""
    used, rewards, state = algorithm.rewards(rollout or world.rollout(), algorithm.init(), world.longest)
    credit, state = algorithm.estimate(used, rewards, state)
    return used, credit, functools.partial(algorithm.loss, state=state)


def flat(world: World) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in world.parameters])


def eager(world: World) -> World:
    """SDPA on the CPU cannot be differentiated twice."""
    world.actor.policy.set_attn_implementation("eager")
    return world


ROOT = Path(__file__).parents[1]
# TRPO with leave-one-out compares rows of one group; on enumerated rows any credit will do
ALGORITHM = TRPO(kl_coef=0.0)


@pytest.mark.parametrize("kind", ["gpt2", "lstm"])
def test_products_are_those_of_the_explicit_fisher_matrix(kind):
    """F = E[s sᵀ] with s the score function of a whole completion, from hfpg's own loss."""
    world = eager(World(kind=kind)) if kind == "gpt2" else World(kind=kind)
    rollout, credit, loss = credited(world, ALGORITHM)
    s = world.score_vectors(ALGORITHM, rollout).sum(1)
    fisher = torch.einsum("b,bd,be->de", rollout.weights / rollout.weights.sum(), s, s)
    region = TrustRegion(world.learner, rollout, credit, loss)
    for seed in range(3):
        v = torch.randn(len(fisher), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert error(region.exact_product(v), fisher @ v) < 1e-10
        assert error(region.difference_product(v), fisher @ v) < 1e-5


def test_the_divergence_is_the_kl_summed_over_a_completion():
    world = World()
    rollout, credit, loss = credited(world, ALGORITHM)
    region = TrustRegion(world.learner, rollout, credit, loss)
    zero = torch.zeros_like(flat(world))
    before = flat(world)
    assert abs(region.at(zero)[0]) < 1e-14
    offset = 0.05 * torch.randn(len(zero), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = region.at(offset)[0]
    old_p, old = rollout.weights, rollout.old_logprobs
    kl = (old_p * (old - world.logprobs().detach()).sum(1)).sum() / 2  # KL of sequences = Σ_t KL of tokens, exactly
    assert found == pytest.approx(float(kl), rel=1e-9) and found > 1e-4
    region.move(None)
    assert torch.equal(flat(world), before)


@pytest.mark.parametrize("fisher", ["exact", "finite_difference"])
def test_every_step_stays_inside_and_the_objective_rises(fisher):
    world = eager(World(max_tokens_per_micro_batch=1000))
    algorithm = TRPO(kl_coef=0.0, max_kl=0.02, fisher=fisher, num_generations=2)
    start = float((world.probabilities() * world.scores).sum().detach()) / 2
    state = algorithm.init()
    for _ in range(12):
        old = world.rollout()
        metrics, state = algorithm.update(world.learner, *credited(world, algorithm, old)[:2], state)
        kl = float((old.weights * (old.old_logprobs - world.logprobs().detach()).sum(1)).sum() / 2)
        assert metrics["trust_region_kl"] == pytest.approx(kl, rel=1e-6, abs=1e-12) and kl <= 0.02
        assert metrics["line_search_failures"] == 0 and metrics["surrogate_gain"] > 0
        assert metrics["trust_region_kl"] > 0.001  # and it uses the room that it has
    assert float((world.probabilities() * world.scores).sum().detach()) / 2 > start + 0.15


def test_a_search_that_fails_leaves_everything_bit_for_bit(monkeypatch):
    world = World()
    before, rollout = flat(world).clone(), world.rollout()
    monkeypatch.setattr(TrustRegion, "at", lambda self, offset: (self.move(offset), (float("nan"), 0.0))[1])
    metrics = natural_step(world.learner, *credited(world, ALGORITHM, rollout), max_kl=0.01)
    assert metrics["line_search_failures"] == 1 and metrics["optimizer_steps"] == 0 and metrics["step_fraction"] == 0
    assert torch.equal(flat(world), before)


def test_nothing_to_learn_is_no_step():
    world = World()
    before = flat(world).clone()
    rollout, credit, loss = credited(world, ALGORITHM)
    nothing = dataclasses.replace(credit, advantages=torch.zeros_like(credit.advantages))
    metrics = natural_step(world.learner, rollout, nothing, loss, max_kl=0.01)
    assert metrics["optimizer_steps"] == 0 and metrics["skipped_steps"] == 0 and torch.equal(flat(world), before)


def test_the_step_does_not_depend_on_the_micro_batches():
    steps = []
    for tokens in (30, 1000):
        world = World(longest=2, max_tokens_per_micro_batch=tokens)
        before = flat(world)
        ALGORITHM.update(world.learner, *credited(world, ALGORITHM)[:2], ALGORITHM.init())
        steps.append(flat(world) - before)
    assert error(steps[0], steps[1]) < 1e-6 and steps[1].norm() > 0


def test_one_trial_chooses_how_products_are_made():
    """SDPA kernels have no second derivative on the CPU; eager attention and the LSTM have."""
    for world, expected in [(World(), "finite_difference"), (eager(World()), "exact"), (World(kind="lstm"), "exact")]:
        if expected == "finite_difference":
            world.actor.policy.set_attn_implementation("sdpa")
        before = flat(world)
        region, v = TrustRegion(world.learner, *credited(world, ALGORITHM)), torch.ones(len(before)).double()
        assert choose_fisher(region, "auto", v) == expected and torch.equal(flat(world), before)
        assert choose_fisher(region, "finite_difference", v) == "finite_difference"
        if expected == "exact":
            assert choose_fisher(region, "exact", v) == "exact"
            continue
        with pytest.raises(
            ConfigError, match="GPT2LMHeadModel have no second derivative here; load it with attn_impl"
        ):
            choose_fisher(region, "exact", v)


class Silent(torch.autograd.Function):
    """x ↦ x³, whose backward pass hides from autograd that its slope depends on x."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return grad * 3 * ctx.saved_tensors[0].detach() ** 2


def test_a_kernel_whose_second_derivative_is_wrong_is_found_out(monkeypatch):
    world = eager(World())
    region = TrustRegion(world.learner, *credited(world, ALGORITHM))
    divergence, head = TrustRegion.divergence, world.actor.policy.transformer.ln_f.weight
    silent = lambda self, rows: divergence(self, rows) + Silent.apply(head).sum()  # noqa: E731
    monkeypatch.setattr(TrustRegion, "divergence", silent)
    assert choose_fisher(region, "auto", torch.ones(len(flat(world))).double()) == "finite_difference"


@pytest.mark.parametrize("kind", ["gpt2", "lstm"])
def test_products_through_recomputed_chunks_are_the_same(kind, monkeypatch):
    found = []
    for elements in (1 << 22, 8):
        monkeypatch.setattr("hfpg.ops.logprobs.CHUNK_ELEMENTS", elements)
        world = eager(World(kind=kind)) if kind == "gpt2" else World(kind=kind)
        region = TrustRegion(world.learner, *credited(world, ALGORITHM))
        found.append(region.exact_product(torch.ones(len(flat(world))).double()))
    assert error(found[1], found[0]) < 1e-12


@pytest.mark.parametrize("fisher", ["exact", "finite_difference"])
def test_the_whole_step_ends_on_the_border_where_the_divergence_is_quadratic(fisher):
    """½ sᵀ(F + λI)s = δ, so D of the whole step is δ for a δ so small that no higher order counts."""
    world = eager(World())
    settings = dict(max_kl=1e-8, damping=1e-3, cg_iterations=20, fisher=fisher)
    metrics = natural_step(world.learner, *credited(world, ALGORITHM), **settings)
    assert metrics["trust_region_kl"] / metrics["step_fraction"] ** 2 == pytest.approx(1e-8, rel=0.02)
    assert metrics["fisher_exact"] == (fisher == "exact")


def test_an_interrupt_leaves_everything_bit_for_bit(monkeypatch):
    passes, stop, scored = [], [0], TrustRegion._scored

    def interrupted(self, rows):
        passes.append(1)
        if len(passes) == stop[0]:
            raise KeyboardInterrupt
        return scored(self, rows)

    monkeypatch.setattr(TrustRegion, "_scored", interrupted)
    settings = dict(max_kl=1e-3, cg_iterations=2, fisher="finite_difference")
    natural_step(World().learner, *credited(World(), ALGORITHM), **settings)
    for stop[0] in (len(passes), len(passes) // 2):  # in the line search; in a finite difference
        world = World()
        before = flat(world).clone()
        passes.clear()
        with pytest.raises(KeyboardInterrupt):
            natural_step(world.learner, *credited(world, ALGORITHM), **settings)
        assert torch.equal(flat(world), before)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_an_adapter_on_sdpa(kind):
    """LoRA starts with B = 0: half of the Fisher matrix is 0, and the damping keeps the step finite."""
    modules = ["c_attn"] if kind == "gpt2" else ["q_proj", "v_proj"]
    policy = get_peft_model(tiny.model(kind), LoraConfig(r=2, target_modules=modules, task_type="CAUSAL_LM"))
    actor = ActorCritic(policy)
    learner = build.learner(actor)
    learner.reference = Reference(actor)
    rollout, credit = build.rollout_of(build.draw(actor), learner)
    frozen = {n: p.detach().clone() for n, p in actor.named_parameters() if not p.requires_grad}
    algorithm = TRPO()
    metrics, _ = algorithm.update(learner, rollout, credit, algorithm.init())
    assert metrics["optimizer_steps"] == 1 and 0 < metrics["trust_region_kl"] <= 0.01
    assert all(torch.equal(p, frozen[n]) for n, p in actor.named_parameters() if n in frozen)
    shared = TrustRegion(learner, rollout, credit, algorithm.loss).old
    ours = {p.data_ptr() for n, p in actor.named_parameters() if not p.requires_grad}
    assert ours <= {p.data_ptr() for p in shared.parameters()}  # the old policy costs an adapter, not a model


def test_low_precision_is_refused():
    actor = ActorCritic(copy.deepcopy(tiny.model()).to(torch.bfloat16))
    learner = build.learner(actor)
    rollout, credit = build.rollout_of(build.draw(actor), learner)
    with pytest.raises(
        ConfigError, match=r"lost in the rounding of \['torch.bfloat16'\] parameters; load the model in"
    ):
        natural_step(learner, rollout, credit, ALGORITHM.loss, max_kl=0.01)


WORKER = """
import sys, torch
from accelerate import Accelerator
from tests import build, tiny
from hfpg import TrainConfig
from hfpg.algorithms import TRPO
from hfpg.distributed import leave
from hfpg.learner import Learner
from hfpg.models import ActorCritic
from hfpg.types import Estimates

torch.set_num_threads(1)
model = tiny.model("gpt2").double()
model.set_attn_implementation("eager")
actor = ActorCritic(model)
accelerator = Accelerator(cpu=True)
found = {"world": accelerator.num_processes}
learner = Learner(actor, accelerator, TrainConfig(max_tokens_per_micro_batch=40))
samples = build.draw(actor, count=13)
rollout, credit = build.rollout_of(samples, learner)
credit = Estimates(credit.advantages.double())
one = torch.tensor([3])
for name, rows in [("lonely", one), ("auto", torch.arange(13)), ("finite_difference", torch.arange(13))]:
    fisher = "finite_difference" if name == "finite_difference" else "auto"
    algorithm = TRPO(fisher=fisher, max_kl=1e-3, kl_coef=0.0)
    start = torch.cat([p.detach().flatten() for p in actor.parameters()])
    metrics, _ = algorithm.update(learner, rollout.take(rows), credit.take(rows), algorithm.init())
    now = torch.cat([p.detach().flatten() for p in actor.parameters()])
    found[name] = {"step": now - start, "metrics": metrics, "all": accelerator.gather(now[None])}
if accelerator.is_main_process:
    torch.save(found, sys.argv[1])
leave()
"""


@pytest.mark.distributed
def test_two_processes_take_the_step_of_one(tmp_path):
    """A rank without rows takes part too, and both end at the same bits."""
    (tmp_path / "worker.py").write_text(WORKER)
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    found = []
    for start in ([sys.executable], torchrun):
        command = [*start, str(tmp_path / "worker.py"), str(tmp_path / "found.pt")]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(torch.load(tmp_path / "found.pt", weights_only=True))
    one, two = found
    assert (one["world"], two["world"]) == (1, 2)
    for name in ("lonely", "auto", "finite_difference"):
        assert one[name]["metrics"]["optimizer_steps"] == 1 and torch.equal(*two[name]["all"])
        assert error(two[name]["step"], one[name]["step"]) < 1e-6
        assert two[name]["metrics"] == pytest.approx(one[name]["metrics"], rel=1e-5, abs=1e-9)

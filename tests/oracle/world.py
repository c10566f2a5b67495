"""A world small enough to enumerate: every completion of every prompt, with its probability, through hfpg's own code.

Vocabulary {0 = EOS, 1, 2}, at most T tokens, two prompts of different lengths (left-padded), a tiny GPT-2 or LSTM in
float64. A batch of *all* completions with row weight π(y|x) turns an estimator's expectation into one gradient: what
the Learner accumulates is then E[gradient], exactly, to be compared with autograd on J itself.

Estimators that compare rows with each other have no such batch. For them `tuples` runs hfpg's `rewards` and `estimate`
on every K-tuple of completions and contracts the advantages with score vectors that come out of hfpg's loss.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TopPLogitsWarper

from hfpg.learner import Learner
from hfpg.models import ActorCritic, Reference
from hfpg.ops.logprobs import pack_bits
from hfpg.ops.masked import token_coefficients
from hfpg.types import Estimates, Rollout, Samples
from tests import build, tiny


VOCABULARY, LONGEST = 3, 3
PROMPTS = ([1, 2, 1], [2])


def completions(longest: int = LONGEST, vocabulary: int = VOCABULARY) -> list[list[int]]:
    """Every completion: it ends with EOS (0) or is cut at `longest` tokens."""
    found: list[list[int]] = []
    for length in range(1, longest + 1):
        for body in itertools.product(range(1, vocabulary), repeat=length - 1):
            found += [[*body, last] for last in range(vocabulary) if last == 0 or length == longest]
    return found


def reward(prompt: int, completion: list[int]) -> float:
    """An arbitrary table: depends on prompt, tokens, order and length, with an offset per prompt."""
    seen = sum((i + 1) * (token + 0.7) ** 2 for i, token in enumerate(completion))
    return float(torch.sin(torch.tensor(3.1 * seen + prompt, dtype=torch.float64))) + 2.0 * prompt


class World:
    """All (prompt, completion) rows, a policy, a different reference, and a learner on them."""

    def __init__(
        self,
        value: Any = None,
        temperature: float = 1.0,
        kind: str = "gpt2",
        prompts: Sequence[list[int]] = PROMPTS,
        longest: int = LONGEST,
        **settings: Any,
    ):
        self.prompts, self.longest = prompts, longest
        texts = completions(longest)
        pairs = [(p, y) for p in range(len(prompts)) for y in texts]
        width = max(map(len, prompts))
        ids = torch.zeros(len(pairs), longest, dtype=torch.long)
        mask = torch.zeros(len(pairs), longest, dtype=torch.bool)
        prompt_ids = torch.zeros(len(pairs), width, dtype=torch.long)
        prompt_mask = torch.zeros(len(pairs), width, dtype=torch.bool)
        for row, (p, y) in enumerate(pairs):
            ids[row, : len(y)], mask[row, : len(y)] = torch.tensor(y), True
            prompt_ids[row, width - len(prompts[p]) :] = torch.tensor(prompts[p])
            prompt_mask[row, width - len(prompts[p]) :] = True
        self.samples = Samples(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            completion_ids=ids,
            completion_mask=mask,
            finished=torch.tensor([y[-1] == 0 for _, y in pairs]),
            sample_ids=torch.arange(len(pairs)),
            group_ids=torch.tensor([p for p, _ in pairs]),
        )
        self.scores = torch.tensor([reward(p, y) for p, y in pairs], dtype=torch.float64)
        policy = tiny.model(kind, seed=3, vocabulary=VOCABULARY, **SMALLER.get(kind, {})).double()
        self.actor = ActorCritic(policy, value)
        self.reference = Reference(self.actor)
        with torch.no_grad():  # a reference that differs from the policy, and a value function that knows nothing
            for parameter in self.reference.scorer.parameters():
                parameter.mul_(1.1)
            if self.actor.value is not None:
                self.actor.value.double()
                self.actor.value.linear.weight.normal_(generator=torch.Generator().manual_seed(5))
        self.temperature = temperature
        self.learner: Learner = build.learner(
            self.actor, temperature=temperature, **({"max_tokens_per_micro_batch": 40} | settings)
        )
        self.learner.reference = self.reference
        self.parameters = [p for n, p in self.actor.named_parameters() if not n.startswith("value.")]

    def logprobs(self) -> Tensor:
        """log π(y_t | x, y_<t), [B, C], with gradient: the definition, by one plain forward of the model."""
        s = self.samples
        attention = torch.cat([s.prompt_mask, s.completion_mask], 1).long()
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        inputs = torch.cat([s.prompt_ids, s.completion_ids], 1)
        logits = self.actor.policy(input_ids=inputs, attention_mask=attention, position_ids=positions).logits
        logp = (logits[:, s.prompt_ids.shape[1] - 1 : -1] / self.temperature).log_softmax(-1)
        return logp.gather(2, s.completion_ids[..., None])[..., 0] * s.completion_mask

    def kept(self, top_p: float) -> tuple[Tensor, Tensor]:
        """Top-p by transformers' own warper: the support as packed bits, and log-probs on it [B, C], with gradient."""
        s = self.samples
        attention = torch.cat([s.prompt_mask, s.completion_mask], 1).long()
        inputs = torch.cat([s.prompt_ids, s.completion_ids], 1)
        places = (attention.cumsum(1) - 1).clamp(min=0)
        logits = self.actor.policy(input_ids=inputs, attention_mask=attention, position_ids=places).logits
        logits = logits[:, s.prompt_ids.shape[1] - 1 : -1] / self.temperature
        support = TopPLogitsWarper(top_p)(None, logits.detach().flatten(0, 1)).view_as(logits) > -torch.inf
        logp = logits.masked_fill(~support, -torch.inf).log_softmax(-1)
        chosen = logp.gather(2, s.completion_ids[..., None])[..., 0]
        return pack_bits(support), torch.where(s.completion_mask, chosen, 0)

    def probabilities(self) -> Tensor:
        """π(y|x) of every row, [B]; they sum to 1 per prompt."""
        return self.logprobs().sum(1).exp()

    def objective_gradient(self, kl_coef: float = 0.0) -> Tensor:
        """∇ of J = mean over prompts of Σ_y π(y|x) (r(x, y) − β log π(y|x)/π_ref(y|x)), by autograd on the sum."""
        p = self.probabilities()
        value = self.scores
        if kl_coef:
            reference = self.rollout().ref_logprobs.sum(1)
            value = value - kl_coef * (p.log() - reference)
        total = (p * value).sum() / len(self.prompts)
        return self.flat(torch.autograd.grad(total, self.parameters, allow_unused=True))

    def rollout(self, **changes: Any) -> Rollout:
        """All rows, scored by the learner, weighted by π(y|x)."""
        old = self.learner.score(self.samples, with_last_values=self.actor.value is not None)
        fields = {name: getattr(self.samples, name) for name in Samples.__dataclass_fields__}
        fields |= dict(scores=self.scores, weights=self.probabilities().detach())
        fields |= dict(old_logprobs=old.logprobs, entropy=old.entropy, ref_logprobs=old.ref_logprobs)
        return Rollout(**(fields | dict(values=old.values, last_values=old.last_values) | changes))

    def estimated_gradient(self, algorithm: Any, rollout: Rollout, state: Any = None) -> Tensor:
        """What the algorithm's estimate and loss make the Learner accumulate, with the sign of ascent."""
        rollout, rewards, state = algorithm.rewards(rollout, state or algorithm.init(), self.longest)
        credit, state = algorithm.estimate(rollout, rewards, state)
        return self.loss_gradient(algorithm, rollout, credit, state)

    def loss_gradient(self, algorithm: Any, rollout: Rollout, credit: Estimates, state: Any) -> Tensor:
        """What the algorithm's loss makes the Learner accumulate for this credit, with the sign of ascent."""
        self.actor.zero_grad()
        loss, schedule = functools.partial(algorithm.loss, state=state), algorithm.schedule(state)
        wanted = {name: schedule[name] for name in ("with_entropy", "with_kl", "token_local")}
        self.learner.gradient(rollout, credit, loss, algorithm.aggregation, **wanted)
        return -self.flat([p.grad for p in self.parameters])

    def score_vectors(self, algorithm: Any, rollout: Rollout) -> Tensor:
        """[B, C, D]: the gradient that the algorithm's loss gives for credit 1 on one token of one row."""
        found = torch.zeros(
            *rollout.completion_ids.shape, sum(p.numel() for p in self.parameters), dtype=torch.float64
        )
        plain = _summing(algorithm)
        for b in range(len(rollout)):
            row = rollout.take(torch.tensor([b]))
            row = type(row)(**(vars(row) | {"weights": torch.ones(1, dtype=torch.float64)}))
            for t in range(int(row.completion_mask.sum())):
                one = torch.zeros(1, self.longest, dtype=torch.float64)
                one[0, t] = 1
                found[b, t] = self.loss_gradient(
                    plain, row, Estimates(one, one if algorithm.value else None), plain.init()
                )
        return found

    def tuples(self, algorithm: Any, count: int, rollout: Rollout | None = None, state: Any = None) -> Tensor:
        """E[gradient] of an estimator that compares `count` completions of the (one) prompt, over all tuples."""
        rollout = self.rollout() if rollout is None else rollout
        p, vectors = rollout.weights, self.score_vectors(algorithm, rollout)
        expected = torch.zeros(vectors.shape[2], dtype=torch.float64)
        for rows in itertools.product(range(len(rollout)), repeat=count):
            index = torch.tensor(rows)
            batch = rollout.take(index)
            batch = type(batch)(**(vars(batch) | {"weights": torch.ones(count, dtype=torch.float64)}))
            used, rewards, after = algorithm.rewards(batch, state or algorithm.init(), self.longest)
            credit, _ = algorithm.estimate(used, rewards, after)
            c = token_coefficients(batch.completion_mask, used.weights, algorithm.aggregation, self.longest)
            expected += p[index].prod() * torch.einsum("bt,btd->d", c * credit.advantages, vectors[index])
        return expected

    def flat(self, gradients: Any) -> Tensor:
        """One vector; a parameter without gradient counts as 0."""
        pairs = zip(gradients, self.parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])

    def of_greedy(self) -> Tensor:
        """The score of the prompt's greedy completion, for every row [B]."""
        p, ids, groups = self.probabilities().detach(), self.samples.completion_ids, self.samples.group_ids
        found = torch.zeros(len(p), dtype=torch.float64)
        for prompt in range(len(self.prompts)):
            rows = (groups == prompt).nonzero()[:, 0]
            for t in range(self.longest):  # the likeliest token after the prefix; the rows that go on with it
                mass = [float(p[rows[ids[rows, t] == token]].sum()) for token in range(VOCABULARY)]
                if int(self.samples.completion_mask[rows, t].sum()) == 0:
                    break
                rows = rows[ids[rows, t] == max(range(VOCABULARY), key=mass.__getitem__)]
            assert len(rows) == 1
            found[groups == prompt] = self.scores[rows[0]]
        return found

    def exact_values(self) -> Tensor:
        """V(s_t) = E[score | x, y_<t] of every row, [B, C], by summing over the rows that share the prefix."""
        p, values = self.probabilities().detach(), torch.zeros(self.samples.completion_ids.shape, dtype=torch.float64)
        ids, groups = self.samples.completion_ids, self.samples.group_ids
        for row in range(len(ids)):
            for t in range(int(self.samples.completion_mask[row].sum())):
                same = (groups == groups[row]) & (ids[:, :t] == ids[row, :t]).all(1)
                same &= self.samples.completion_mask[:, t]
                values[row, t] = (p * self.scores)[same].sum() / p[same].sum()
        return values


SMALLER: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 8, "n_positions": 8},
    "lstm": {"hidden_size": 8, "embedding_size": 4, "num_hidden_layers": 1},
}


def _summing(algorithm: Any) -> Any:
    """The same method, with the aggregation that leaves a token's gradient as it is."""
    without = {f.name: f.default for f in dataclasses.fields(algorithm) if f.name in ("kl_in", "kl_estimator")}
    without |= {"aggregation": "sequence_sum", "kl_coef": 0.0, "entropy_coef": 0.0}
    return type(algorithm)(**(vars(algorithm) | without))


def cosine(a: Tensor, b: Tensor) -> float:
    """Of the angle between two gradients."""
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def error(estimate: Tensor, truth: Tensor) -> float:
    """Relative L2 distance."""
    return float((estimate - truth).norm() / truth.norm())

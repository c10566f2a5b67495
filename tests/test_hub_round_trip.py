"""Train from a repository, push, load back with plain transformers and with hfpg: real clients, a Hub on loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import build
from tests.hub_server import HubServer


ROOT = Path(__file__).parents[1]
CHILD = """
import json, sys
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
from hfpg import hub
from hfpg.algorithms import PPO
from hfpg.saving import load_actor_critic
from tests import build, tiny

out, lora = sys.argv[1], sys.argv[2] == "lora"
tiny.model().push_to_hub("tester/base")
tiny.tokenizer().push_to_hub("tester/base")
peft = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM") if lora else None
trainer = build.trainer(
    out, model="tester/base", processing_class=None, algorithm=PPO(epochs=1), peft_config=peft, max_steps=2,
    eval_dataset=tiny.rows(4), eval_on_start=True, push_to_hub=True, hub_model_id="tester/tuned",
)
trainer.evaluate()
trainer.train()
trainer.evaluate()
trainer.push_to_hub("tester/tuned")
policy, ids = trainer.learner.actor.policy, torch.tensor([[3, 4, 5]])
plain = AutoModelForCausalLM.from_pretrained("tester/tuned")
ours = load_actor_critic(hub.pull("tester/tuned"))
AutoTokenizer.from_pretrained("tester/tuned")
again = build.trainer(out + "2", model="tester/tuned", processing_class=None, algorithm=PPO(epochs=1), max_steps=1)
continued = torch.equal(again.learner.actor.value.linear.weight, trainer.learner.actor.value.linear.weight)
kl = again.train()["kl_to_ref"]
print(json.dumps({
    "continued": continued, "kl": kl, "adapter_again": hasattr(again.learner.actor.policy, "peft_config"),
    "plain": torch.allclose(plain(input_ids=ids).logits, policy(input_ids=ids).logits, rtol=0, atol=1e-6),
    "ours": torch.equal(ours.policy(input_ids=ids).logits, policy(input_ids=ids).logits),
    "value": torch.equal(ours.value.linear.weight, trainer.learner.actor.value.linear.weight),
    "value_learned": float(ours.value.linear.weight.abs().max()),
    "gap": float((plain(input_ids=ids).logits - tiny.model()(input_ids=ids).logits).abs().max()),
}))
"""


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_train_from_a_repository_push_and_load_back(kind, tmp_path):
    with HubServer() as server:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        environment |= server.env(tmp_path / "home") | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(tmp_path / "run"), kind],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(done.stdout.strip().splitlines()[-1])
        assert found["plain"] and found["ours"] and found["value"]
        assert found["value_learned"] > 0 and found["gap"] > 0
        assert found["continued"] and abs(found["kl"]) < 1e-5, "what was pushed can be trained on, value head included"
        assert found["adapter_again"] == (kind == "lora")
        files = server.files("tester/tuned")
    assert {"README.md", "value_head.safetensors", "hfpg.json", "config.json"} - set(files) <= {"config.json"}
    assert ("adapter_model.safetensors" if kind == "lora" else "model.safetensors") in files
    assert not any("run.json" in name or "checkpoint" in name or name.endswith((".bin", ".pt")) for name in files)
    card = (tmp_path / "run" / "final" / "README.md").read_text()
    assert "base_model: tester/base" in card and "eval" not in card.split("---")[0]
    assert str(tmp_path) not in card


def test_the_card_names_the_repository_the_branch_and_no_base_that_nobody_has(tmp_path, monkeypatch):
    run = build.trainer(tmp_path / "run")
    with HubServer() as server:
        server.use_here(monkeypatch, tmp_path)
        run.push_to_hub("policy", private=True, revision="exp-1")
        assert "README.md" in server.files("tester/policy", "exp-1")
        card = (tmp_path / "run" / "final" / "README.md").read_text()
        run.push_to_hub("tester/other", private=True, revision="exp-2")
    again = (tmp_path / "run" / "final" / "README.md").read_text()
    assert 'model="tester/other", revision="exp-2"' in again
    assert 'model="tester/policy", revision="exp-1"' in card and "# tester/policy" in card
    assert "\nbase_model" not in card and "GPT2LMHeadModel" not in card


def test_a_folder_is_no_base_model_even_where_the_working_folder_has_moved(tmp_path, monkeypatch):
    build.trainer(tmp_path / "run").save_model(tmp_path / "sft" / "base")
    monkeypatch.chdir(tmp_path)
    run = build.trainer(tmp_path / "again", model="sft/base", processing_class=None)
    monkeypatch.chdir("/")
    assert "\nbase_model" not in run.model_card() and run.base_model is None

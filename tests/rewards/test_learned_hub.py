"""A judge from a repository, by its id: plain, with a label, as an adapter; a real client, a Hub on loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub_server import HubServer


ROOT = Path(__file__).parents[2]
CHILD = """
import json
import torch
torch.set_num_threads(1)
from peft import LoraConfig, TaskType, get_peft_model
from transformers import GPT2ForSequenceClassification, pipeline
from hfpg.config import ConfigError
from hfpg.rewards import ClassifierReward, Judge
from tests import tiny
from tests.rewards.test_learned import COMPLETIONS, PROMPTS, bert, classifier, own_tokenizer

def push(name, model, tokenizer):
    model.push_to_hub(f"tester/{name}")
    tokenizer.push_to_hub(f"tester/{name}")

def gap(found, expected):
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))

push("judge", bert(), own_tokenizer(pad_token="<unk>"))
push("labels", *classifier("llama"))
push("lm", tiny.model(), tiny.tokenizer())
torch.manual_seed(0)
base = GPT2ForSequenceClassification.from_pretrained("tester/lm", num_labels=1, pad_token_id=1)
adapted = get_peft_model(base, LoraConfig(task_type=TaskType.SEQ_CLS, r=2, init_lora_weights=False))
push("adapter", adapted, tiny.tokenizer(pad_token="<unk>"))
pipe = pipeline("text-classification", model="tester/judge", function_to_apply="none", dtype="float32")
expected = [pipe(p + c)[0]["score"] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
judge = Judge(["tester/judge", "tester/labels#good", "tester/adapter"])
table = judge(PROMPTS, COMPLETIONS, [[1]] * 9, {}).by_function
model, tokenizer = classifier("llama")
whole = ClassifierReward(adapted, tiny.tokenizer(pad_token="<unk>"))
refused = []
for name in ("tester/lm", "tester/gone"):
    try:
        ClassifierReward(name)
    except ConfigError as error:
        refused.append(str(error))
print(json.dumps({
    "names": judge.names,
    "plain": gap(table["judge"], expected),
    "label": gap(table["labels"], ClassifierReward(model, tokenizer, label="good")(PROMPTS, COMPLETIONS)),
    "adapter": gap(table["adapter"], whole(PROMPTS, COMPLETIONS)),
    "refused": refused,
}))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    with HubServer() as server:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        environment |= server.env(home) | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", CHILD]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_a_judge_is_named_by_the_id_of_its_repository(found):
    assert found["names"] == ["judge", "labels", "adapter"]
    assert found["plain"] < 1e-4 and found["label"] < 1e-4 and found["adapter"] < 1e-4


def test_what_is_no_judge_is_refused_in_a_sentence(found):
    untrained, gone = found["refused"]
    assert untrained.startswith("cannot load the reward model 'tester/lm': its checkpoint has no score.weight")
    assert gone.startswith("cannot load the reward model 'tester/gone': ") and "\n" not in gone

"""`flags.py FOLDER`, run by two processes: what only rank 0 sees or suffers, both must follow."""

import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from hfpg import checkpoint
from tests import build, tiny


class Stops(TrainerCallback):
    """Ends training in step 2, in one event, on rank 0 alone: as one does that looks at a file or at the clock."""

    def __init__(self, event: str):
        self.event = event

    def _seen(self, state, control):
        control.should_training_stop |= state.is_world_process_zero and state.global_step == 2

    def on_log(self, args, state, control, **_):
        if self.event == "evaluate":
            control.should_evaluate |= state.is_world_process_zero and state.global_step == 1
        if self.event == "on_log":
            self._seen(state, control)

    def on_evaluate(self, args, state, control, **_):
        if self.event == "on_evaluate":
            self._seen(state, control)

    def on_save(self, args, state, control, **_):
        if self.event == "on_save":
            self._seen(state, control)


def main(folder: str) -> None:
    torch.set_num_threads(1)
    for event in ("on_log", "on_evaluate", "on_save"):
        given = dict(callbacks=[Stops(event)], eval_dataset=tiny.rows(4), eval_steps=1, save_steps=1, max_steps=4)
        trainer = build.trainer(f"{folder}/{event}", **given)
        trainer.train()
        trainer.evaluate()
        assert trainer.state.global_step == 2, (event, trainer.state.global_step)

    trainer = build.trainer(f"{folder}/evaluate", callbacks=[Stops("evaluate")], eval_dataset=tiny.rows(4))
    trainer.train()
    assert [e["step"] for e in trainer.evaluations] == [1], trainer.evaluations

    plain, full = checkpoint.save_actor_critic, [1]

    def once(actor, where):  # only rank 0 writes, and its disk is full at the first checkpoint
        if full.pop() if full else 0:
            raise OSError(28, "No space left on device")
        plain(actor, where)

    checkpoint.save_actor_critic = once
    build.trainer(f"{folder}/full", max_steps=4, save_steps=2).train()
    assert Path(folder, "full", "checkpoint-3").is_dir() and not Path(folder, "full", "checkpoint-2").exists()


if __name__ == "__main__":
    main(sys.argv[1])

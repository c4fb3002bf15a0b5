"""Runs of two processes that share the base, each with a state on the way; `torchrun --nproc_per_node 2 tests/sharing.py FOLDER`.

What the first process finds goes into the folder, a file of tensors a method: the losses, a state after some steps, and the losses of a
run that goes on from a state of one process, which the folder has.
"""
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from medpeft_study.measure import follow
from medpeft_study.processes import place

TOY = dict(backbone='toy-llama', device='cpu', base_storage='sharded', rank=8, target_rank=2, train_rows=49, val_rows=12, test_rows=0, max_length=128, dropout=0., lr=5e-3, micro_batch_size=4)
AT = 2 # steps that a state is taken after


def losses(method: str, **how) -> torch.Tensor:
    "Train as a run does"
    return torch.tensor([h['task_loss'] for h in follow(TOY | dict(method=method), 'fast', **how)[-1]], dtype=torch.float64)


def with_state(method: str) -> dict: # losses, and the tensors of the state
    "Train, and take a state, which only the first process asks for"
    found = {}
    def keep(step, take, nbytes):
        if step == AT and place().first: found.update({f'state.{k}': v.clone() for k, v in take().items()})
    return dict(losses=losses(method, keep=keep)) | found


def state_of(found: dict) -> dict: return {k.removeprefix('state.'): v for k, v in found.items() if k.startswith('state.')}


if __name__ == '__main__':
    folder = Path(sys.argv[1])
    for path in sorted(folder.glob('one-*.safetensors')):
        method = path.stem.removeprefix('one-')
        found = with_state(method) | dict(on=losses(method, state=state_of(load_file(path))))
        if place().first: save_file(found, folder / f'two-{method}.safetensors')

"""Runs of two processes that share the base, one with a state on the way; `torchrun --nproc_per_node 2 tests/sharing.py FOLDER`.

What the first process finds goes into the folder: of AdaLoRA, which has all that is divided (moments, and averages of importance), losses,
a state after some steps, and losses of a run that goes on from a state of one process, which the folder has; of prompt tuning the losses
on a backbone whose embedding is its head, with virtual tokens beside it.
"""
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from medpeft_study.measure import follow
from medpeft_study.processes import place

TOY = dict(backbone='toy-llama', device='cpu', base_storage='sharded', train_rows=49, val_rows=12, test_rows=0, max_length=128, lr=5e-3, micro_batch_size=4)
OWN = dict(adalora=dict(rank=8, target_rank=2, dropout=0.), prompt=dict(backbone='toy-gemma3', virtual_tokens=5)) # of a method
AT = 2 # steps that a state is taken after


def losses(method: str, **how) -> torch.Tensor:
    "Train as a run does"
    return torch.tensor([h['task_loss'] for h in follow(TOY | dict(method=method) | OWN[method], 'fast', **how)[-1]], dtype=torch.float64)


def with_state(method: str) -> dict: # losses, and the tensors of the state
    "Train, and take a state, which only the first process asks for"
    found = {}
    def keep(step, take, nbytes):
        if step == AT and place().first: found.update({f'state.{k}': v.clone() for k, v in take().items()})
    return dict(losses=losses(method, keep=keep)) | found


def state_of(found: dict) -> dict: return {k.removeprefix('state.'): v for k, v in found.items() if k.startswith('state.')}


if __name__ == '__main__':
    folder = Path(sys.argv[1])
    found = with_state('adalora') | dict(on=losses('adalora', state=state_of(load_file(folder / 'one.safetensors'))), prompt=losses('prompt'))
    if place().first: save_file(found, folder / 'two.safetensors')

"""The kernels of `fused`, by Triton's interpreter, in a whole training: as plain PEFT trains, however the rows are cut."""
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest

pytest.importorskip('triton', reason='Triton is there for Linux only, and the kernels need it')

TRAIN = """
import json
import sys
import numpy as np
from medpeft_study.adapters import attach
from medpeft_study.backbones import load_backbone
from medpeft_study.fused import can_fuse
from medpeft_study.prompts import Encoded
from medpeft_study.study import run_config
from medpeft_study.training import train

rng, found = np.random.default_rng(0), {}
rows = [Encoded(f'row-{i}', rng.integers(0, 200, int(rng.integers(8, 20))).tolist(), 5, 0) for i in range(12)]
for dropout, micro in ((0., 6), (.2, 6), (.2, 2)):
    cfg = run_config(dict(profile='mini', backbone='toy-llama', device='cpu', method=sys.argv[1], rank=4, target_rank=2, dropout=dropout, lr=.1, warmup_ratio=0.,
                          micro_batch_size=micro, batch_size=6, train_rows=12, max_length=64, budget_start=0., budget_end=1., delta_t=1))
    model = attach(load_backbone(cfg)[0], cfg)
    found[f'{dropout} {micro}'] = [h['task_loss'] for h in train(model, rows, cfg, 0)]
print(json.dumps(dict(fused=can_fuse(model), losses=found)))
"""


def trained(method, interpret):
    done = subprocess.run([sys.executable, '-c', TRAIN, method], capture_output=True, text=True, env=os.environ | dict(TRITON_INTERPRET=interpret))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_training_by_the_kernels():
    ways = list(product(('qlora', 'adalora'), '01'))
    with ThreadPoolExecutor(len(ways)) as pool: found = dict(zip(ways, pool.map(lambda way: trained(*way), ways))) # the interpreter is slow, and takes a core each
    for method in ('qlora', 'adalora'):
        plain, kernels = found[method, '0'], found[method, '1']
        assert (plain['fused'], kernels['fused']) == (False, True)
        # without dropout the same losses
        assert kernels['losses']['0.0 6'] == pytest.approx(plain['losses']['0.0 6'], abs=2e-5)
        # with it the same however rows are cut, which PEFT's is not
        cut = [kernels['losses'][f'0.2 {micro}'] for micro in (6, 2)]
        assert cut[0] == pytest.approx(cut[1], abs=2e-5)
        assert cut[0] != pytest.approx(kernels['losses']['0.0 6'], abs=1e-3)


ANSWERS = """
import torch
from unittest.mock import patch
from medpeft_study import fused, generation
from medpeft_study.adapters import attach
from medpeft_study.backbones import load_backbone, load_tokenizer
from medpeft_study.study import run_config

generation.NEW_TOKENS = 3
items = [dict(item_id=str(i), question='What is ' + 'x' * (3 * i + 1), choices=['Dry skin', 'Thin'], answer=0) for i in range(2)]
for given in (dict(base_storage='packed'), dict(method='adalora', target_rank=2)):
    cfg = run_config(dict(profile='mini', backbone='toy-llama', device='cpu', rank=4) | given)
    torch.manual_seed(0)
    model, tokenizer = attach(load_backbone(cfg)[0], cfg), load_tokenizer(cfg)
    for p in model.parameters():
        if p.requires_grad: p.data += .3 * torch.randn_like(p)
    assert fused.can_fuse(model)
    said = generation.free_answers(model, tokenizer, items, cfg)
    with patch.object(fused, 'triton', None): assert generation.free_answers(model, tokenizer, items, cfg) == said != ['', '']
"""


def test_free_answers_by_the_kernels():
    "Token by token, with keys and values kept, as PEFT's layers give them"
    done = subprocess.run([sys.executable, '-c', ANSWERS], capture_output=True, text=True, env=os.environ | dict(TRITON_INTERPRET='1'))
    assert done.returncode == 0, done.stderr

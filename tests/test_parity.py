"Ten steps of our loop are ten steps of plain PEFT and AdamW on the same batches"
import math

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from medpeft_study.prompts import collate, epoch_batches
from medpeft_study.training import train

PAD = 259


def plain_peft(model, rows, cfg):
    "What a tutorial writes, with the allocator called where PEFT's docstring says"
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=cfg.lr, weight_decay=cfg.weight_decay)
    scheduler = get_scheduler(cfg.schedule, optimizer, math.ceil(cfg.warmup_ratio * cfg.total_steps), cfg.total_steps)
    losses = []
    model.train()
    for step, batch in enumerate(epoch_batches(len(rows), cfg, 0), 1):
        loss = model(**collate([rows[i] for i in batch], 'answer', PAD - 1, cfg.max_length)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(params, cfg.max_grad_norm)
        optimizer.step()
        scheduler.step()
        if cfg.method == 'adalora': model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize('method', ['qlora', 'adalora'])
@pytest.mark.parametrize('backbone', ['toy-llama', 'toy-qwen2', 'toy-gemma3'])
def test_ten_steps(method, backbone, toy_config, toy_model, toy_rows):
    cfg = toy_config(method, backbone=backbone)
    rows = [type(r)(r.item_id, [min(t, 258) for t in r.input_ids], r.n_prompt, 0) for r in toy_rows] # qwen2's vocabulary is smaller
    theirs = plain_peft(toy_model(cfg), rows, cfg)
    ours = [h['reported_loss'] for h in train(toy_model(cfg), rows, cfg, PAD - 1)]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-5)
    assert ours[-1] < ours[0] - 0.02 # something was learned, so the equality means something

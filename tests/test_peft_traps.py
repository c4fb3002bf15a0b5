"""What PEFT's AdaLoRA and the trainers around it do, held against the installed versions.

The study's loop is built around each of these. When an upgrade changes one, a test here fails and says which.
"""
import math
from pathlib import Path

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from medpeft_study.adapters import module_ranks, nonzero_ranks, orthogonality_penalty
from medpeft_study.config import make_config
from medpeft_study.penalty import bare_adapter
from medpeft_study.prompts import byte_tokenizer, collate
from medpeft_study.training import train

PAD = 259


@pytest.fixture
def adalora(toy_config, toy_model): return toy_model(toy_config('adalora')).eval()


@pytest.fixture
def batch(toy_rows): return collate(toy_rows[:16], 'answer', PAD, 64)


def one_step(model, batch, lr=2e-2):
    "A step with plain AdamW; gradients are left in place"
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model(**batch).loss.backward()
    optimizer.step()
    return optimizer


def test_forward_adds_the_penalty_in_eval_mode_and_with_the_adapter_disabled(adalora, batch):
    task = adalora.get_base_model()(**batch).loss
    penalty = 0.5 * orthogonality_penalty(adalora)
    assert penalty > 0.1
    torch.testing.assert_close(adalora(**batch).loss, task + penalty)
    with adalora.disable_adapter(): torch.testing.assert_close(adalora(**batch).loss, task + penalty)


@pytest.mark.parametrize('backbone, nats', [('llama3-8b', 6.1), ('qwen2-7b', 7.3), ('smollm2-135m', 2.9)])
def test_size_of_the_penalty_at_the_start(backbone, nats):
    cfg = make_config('paper', 'adalora', backbone=backbone, device='cpu')
    assert cfg.orth_weight * orthogonality_penalty(bare_adapter(cfg, layers=1)).item() == pytest.approx(nats, abs=0.1) # every layer has the same shapes


class _Gradients(TrainerCallback):
    "Keeps the gradients as the optimizer sees them"
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def trainer_run(model, rows, tmp_path, **options):
    "One optimizer step of the transformers Trainer, 16 rows"
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=1, learning_rate=0., max_grad_norm=0., report_to=[], use_cpu=True,
                             remove_unused_columns=False, save_strategy='no', disable_tqdm=True, logging_strategy='no', **options)
    seen = _Gradients()
    Trainer(model, args, train_dataset=rows[:16], data_collator=lambda r: collate(r, 'answer', PAD, 64), callbacks=[seen]).train()
    return seen.seen


def test_the_trainer_multiplies_the_penalty_by_the_accumulation_steps(toy_config, toy_model, toy_rows, tmp_path):
    "At the start E = 0, so the gradient of A and B is the penalty's alone"
    one = trainer_run(toy_model(toy_config('adalora')), toy_rows, tmp_path, per_device_train_batch_size=16)
    four = trainer_run(toy_model(toy_config('adalora')), toy_rows, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    name = next(n for n in one if '.lora_A.' in n)
    torch.testing.assert_close(four[name], 4 * one[name])


def test_trl_drops_the_penalty(toy_config, toy_model, toy_rows, tmp_path):
    args = trl.SFTConfig(output_dir=str(tmp_path), max_steps=1, learning_rate=0., max_grad_norm=0., report_to=[], use_cpu=True, save_strategy='no',
                         per_device_train_batch_size=16, disable_tqdm=True, dataset_kwargs=dict(skip_prepare_dataset=True), remove_unused_columns=False)
    seen, model = _Gradients(), toy_model(toy_config('adalora'))
    data = Dataset.from_list([dict(input_ids=r.input_ids) for r in toy_rows[:16]])
    trl.SFTTrainer(model, args, train_dataset=data, processing_class=byte_tokenizer('llama3'), callbacks=[seen],
                   data_collator=lambda r: collate(toy_rows[:16], 'answer', PAD, 64)).train()
    assert max(g.abs().max() for n, g in seen.seen.items() if '.lora_A.' in n) == 0 # with the penalty it is not


def test_no_trainer_calls_the_allocator(toy_config, toy_model, toy_rows, tmp_path):
    callers = [p for p in Path(transformers.__file__).parent.glob('*.py') if 'update_and_allocate' in p.read_text(encoding='utf-8')]
    assert callers == []
    model = toy_model(toy_config('adalora'))
    trainer_run(model, toy_rows, tmp_path, per_device_train_batch_size=16)
    assert model.peft_config['default'].rank_pattern is None


def test_the_allocator_needs_the_gradients(adalora, batch):
    optimizer = one_step(adalora, batch)
    adalora.base_model.update_and_allocate(1)
    optimizer.zero_grad()
    with pytest.raises(TypeError): adalora.base_model.update_and_allocate(2)


def test_called_before_the_optimizer_step_the_allocator_prunes_nothing(toy_config, toy_model, batch):
    "What it masks, the step that follows writes again"
    cfg = toy_config('adalora')
    kept = {}
    for when in ('before', 'after'):
        model = toy_model(cfg)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=cfg.lr)
        for step in range(1, cfg.total_steps + 1):
            model(**batch).loss.backward()
            if when == 'before': model.base_model.update_and_allocate(step)
            optimizer.step()
            if when == 'after': model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
        kept[when] = sum(nonzero_ranks(model).values())
    assert kept == dict(before=14 * 8, after=14 * 2)


def test_tfinal_is_a_duration(adalora):
    config, allocator = adalora.peft_config['default'], adalora.base_model.rankallocator
    assert (config.tinit, config.tfinal, config.total_step) == (1, 3, 10)
    budgets = [allocator.budget_schedule(step)[0] for step in range(1, 11)]
    assert budgets[0] == allocator.init_bgt and budgets[4] > allocator.target_bgt # step 5 still prunes
    assert budgets[6:] == [allocator.target_bgt] * 4 # final from step 7 = total - tfinal, not from step 3


def test_masks_apply_at_multiples_of_delta_t_and_regrow_between(toy_config, toy_model, batch):
    cfg = toy_config('adalora', delta_t=3)
    model = toy_model(cfg)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=cfg.lr)
    left, shapes = [], {n: p.shape for n, p in model.named_parameters()}
    for step in range(1, cfg.total_steps + 1):
        model(**batch).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        left.append(sum(nonzero_ranks(model).values()))
    full, target = 14 * 8, 14 * 2
    assert left[2] < full and left[5] < left[2] # masked at steps 3 and 6
    assert left[3] == left[4] == full # grown again between
    assert left[6:] == [target] * 4 # from the final allocation on, every step
    assert {n: p.shape for n, p in model.named_parameters()} == shapes # masked, not removed


def test_adalora_scales_by_its_initial_rank_for_good(toy_config, toy_model, toy_rows):
    cfg = toy_config('adalora')
    model = toy_model(cfg)
    train(model, toy_rows, cfg, PAD)
    layer = next(m for m in model.modules() if hasattr(m, 'lora_E'))
    assert sum(module_ranks(model).values()) == 14 * 2 # pruned
    assert layer.ranknum['default'].item() == cfg.rank and layer.scaling['default'] == cfg.alpha
    x = torch.randn(3, layer.in_features)
    a, e, b = (getattr(layer, f'lora_{k}')['default'] for k in 'AEB')
    torch.testing.assert_close(layer(x) - layer.base_layer(x), x @ (a * e).T @ b.T * cfg.alpha / (cfg.rank + 1e-5), rtol=1e-4, atol=1e-5)
    lora = next(m for m in toy_model(toy_config('qlora')).modules() if hasattr(m, 'lora_A'))
    assert lora.scaling['default'] == cfg.alpha / cfg.rank


def test_total_step_counts_optimizer_steps():
    assert make_config('paper').total_steps == math.ceil(5000 / 16) == 313

"lm-evaluation-harness gives our answers: 200 items, both protocols, both methods, with a chat template and without"
from dataclasses import replace

import numpy as np
import pytest
import torch

from medpeft_study.adapters import attach, resolve_adapter
from medpeft_study.backbones import load_backbone, load_tokenizer, resolve_backbone
from medpeft_study.config import make_config
from medpeft_study.data import load_items, resolve_data, split_items
from medpeft_study.evaluation import predict
from medpeft_study.harness import harness_accuracy, harness_predictions, harness_results, write_tasks

pytest.importorskip('lm_eval', reason='lm-evaluation-harness is not installed: pip install "lm-eval>=0.4.13,<0.5"')


@pytest.fixture(scope='module')
def items():
    "The first 200 validation items that fit a window of 512 tokens, each a byte"
    cfg = resolve_data(make_config('mini', device='cpu'))
    rows = split_items(load_items(cfg)[0], cfg)['validation']
    return [row for row in rows if len(row['question']) + sum(map(len, row['choices'])) < 330][:200]


@pytest.mark.parametrize('method, backbone, spread, plain', [('adalora', 'toy-gemma3', .5, True), ('qlora', 'toy-llama', .5, False), ('qlora', 'smollm2-135m', .02, False)])
def test_the_harness_answers_as_we_do(items, tmp_path, method, backbone, spread, plain):
    cfg = resolve_adapter(resolve_backbone(resolve_data(replace(make_config('mini', method), backbone=backbone, device='cpu', rank=4, target_rank=2))))
    model, tokenizer = attach(load_backbone(cfg)[0], cfg).eval(), load_tokenizer(cfg)
    for i, p in enumerate(p for p in model.parameters() if p.requires_grad): torch.nn.init.normal_(p.data, std=spread, generator=torch.Generator().manual_seed(i))
    tasks = write_tasks(items, 'phenotype-qa', tmp_path / 'tasks', tokenizer)
    ours = predict(model, tokenizer, items, cfg)
    results, samples = harness_results(model.get_base_model(), tokenizer, tmp_path / 'tasks', tasks)
    theirs, accuracy = harness_predictions(samples), harness_accuracy(results)
    assert len(ours) == 200 and theirs.item_id.tolist() == ours.item_id.tolist() and theirs.answer.tolist() == ours.answer.tolist()
    for protocol in ('text', 'letter', *(['text_norm'] if plain else [])):
        assert theirs[protocol].tolist() == ours[protocol].tolist()
        assert accuracy[protocol] == pytest.approx((ours[protocol] == ours.answer).mean())
    for column in ('text_loglik', 'letter_loglik'):
        apart = np.stack(theirs[column]) - np.stack(ours[column])
        assert np.ptp(apart, axis=1).max() < 1e-3 # white space at the end of a template is the same for each choice
        assert not plain or np.abs(apart).max() < 1e-3
    assert len(set(ours.text)) > 2 < len(set(ours.letter)) # answers that could differ

"The audit's page on records that are made up: none, some and all of them; its study, and what of it the report sees"
import copy
import json
import math
import re
from dataclasses import asdict

import nbformat
import numpy as np
import pandas as pd
import pytest

from medpeft_study.again import compare_records, keep
from medpeft_study.config import RunConfig, padded_windows, run_id
from medpeft_study.effects import RATES, SECTIONS, Runs
from medpeft_study.frames import load_records
from medpeft_study.study import STUDIES, command, run_config

PADDING = dict(padded=.001) # nats of a padding token, by the scope that was trained on


def loss_of(cfg, rng):
    "Nats, by a rule that a verdict can be held against"
    loss = 1.3 + .05 * abs(math.log10(cfg.lr / 2e-3)) ** 2 + rng.normal(0, .002)
    if cfg.method == 'adalora': loss += .3 * (cfg.lr < 5e-4) + dict(called=.1, uniform=.1, never=.02, early=.03, zeroed=2.)[cfg.allocator]
    return loss + .1 * (cfg.rank < 64)


def made(params, models, rng):
    "The record that a run might have left"
    cfg = run_config(params | dict(device='cpu'))
    r, loss = copy.deepcopy(models[cfg.method]), loss_of(cfg, rng)
    own = dict(answer=1., sequence=1.9, padded=.35)[cfg.loss_scope] * loss
    penalty = r['history'][-1]['penalty'] * cfg.orth_weight if cfg.method == 'adalora' else 0.
    for m in r['metrics']:
        if (m['when'], m['metric'], m['protocol'], m['domain']) == ('after', 'loss', 'answer', 'all'): m['value'] = loss
        if (m['when'], m['metric']) == ('after', 'reported_loss'): m.update(protocol=cfg.loss_scope, value=own + penalty)
    add = lambda protocol, value, metric='loss': r['metrics'].append(dict(split='validation', when='after', domain='all', protocol=protocol, metric=metric, value=value, stderr=None, low=None, high=None, n=500))
    if cfg.loss_scope != 'answer': add(cfg.loss_scope, own)
    for w in padded_windows(params.get('windows', '')):
        add(f'padded-{w}', 2 * loss * 70 / w + (1 - 70 / w) * PADDING.get(cfg.loss_scope, 3.1)), add(f'padded-{w}', 1 - 70 / w, 'padding_share')
    add('unpadded', 2 * loss)
    return r | dict(run_id=run_id(cfg), study='audit', config=asdict(cfg))


def mini(root):
    "Method -> a committed record of the study mini"
    found = [json.loads(p.read_text()) for p in sorted((root / 'reports' / 'records').glob('*.json'))]
    return {r['config']['method']: r for r in found if (r['study'], *(r['config'][k] for k in ('backbone', 'prompt', 'seed'))) == ('mini', 'smollm2-135m', 'open', 0)}


@pytest.fixture(scope='module')
def world(root):
    "Every record of the study, as JSON"
    models, rng = mini(root), np.random.default_rng(0)
    return [(made(params, models, rng), models) for params in STUDIES['audit'].runs]


def laid(root, folder, world):
    "Records and predictions in a folder"
    for name in ('records', 'predictions'): (folder / name).mkdir(parents=True, exist_ok=True)
    for r, models in world:
        (folder / 'records' / f"{r['run_id']}.json").write_text(json.dumps(r, indent=1, sort_keys=True))
        (folder / 'predictions' / f"{r['run_id']}.parquet").symlink_to(root / 'reports' / 'predictions' / f"{models[r['config']['method']]['run_id']}.parquet")
    return folder


def page(root, folder, monkeypatch):
    "Section -> what it shows, without the toys; and the files written"
    monkeypatch.setenv('MEDPEFT_REPORTS', str(folder))
    space, shown, section = dict(courses={'llama3-8b': [6.13, 1.] + [0.], 'qwen2-7b': [7.3, 1.] + [0.]}), {}, ''
    for cell in nbformat.read(root / 'nbs' / 'audit.ipynb', 4).cells:
        if cell.cell_type == 'markdown' and cell.source.startswith('## '): section = cell.source.split('\n')[0][3:]
        if cell.cell_type != 'code' or not cell.source.startswith('#| echo: false'): continue
        space |= dict(display=lambda *xs: shown.setdefault(section, []).extend(getattr(x, 'data', x) for x in xs)) # after the imports
        exec(compile(cell.source.replace('import Markdown, display', 'import Markdown'), section, 'exec'), space)
    text = {k: '\n'.join(x for x in v if isinstance(x, str)) for k, v in shown.items()}
    return text, {p.name for kind in ('tables', 'figures') for p in (folder / kind).glob('*')}


def beyond(root, folder):
    "What the page's last sections ask for: frozen runs and the same with held-out rows, rehearsed runs, a course of the penalty, a run made again"
    for method, frozen in mini(root).items():
        for study, change in (('mini', {}), ('held_out', dict(unlock_test=True)), ('rehearsal', dict(backbone='llama3-8b', weights='random', backbone_revision=''))):
            config = frozen['config'] | change
            r = frozen | dict(study=study, config=config, run_id=run_id(RunConfig(**config)))
            frame = pd.read_parquet(root / 'reports' / 'predictions' / f"{frozen['run_id']}.parquet")
            if study == 'held_out': r, frame = r | dict(metrics=r['metrics'] + [m | dict(split='test') for m in r['metrics']]), pd.concat([frame, frame.assign(split='test')])
            (folder / 'records' / f"{r['run_id']}.json").write_text(json.dumps(r, indent=1, sort_keys=True))
            frame.to_parquet(folder / 'predictions' / f"{r['run_id']}.parquet")
    points = [dict(backbone=b, noise=n, start=6.1, mean=.8 + n, end=.5 * n, course=[[1, 6.1], [313, max(.5 * n, 1e-5)]]) for b in ('llama3-8b', 'qwen2-7b') for n in (0., 1., 3.)]
    (folder / 'bench').mkdir()
    (folder / 'bench' / 'penalty.json').write_text(json.dumps(dict(points=points)))
    keep(compare_records(r, r), folder / 'bench' / 'reproduced.json')


MEASURED = {s.title: name for name, s in SECTIONS.items()}


def test_without_records_every_section_says_so_and_how_to_get_them(root, tmp_path, monkeypatch):
    text, files = page(root, tmp_path, monkeypatch)
    for title, name in MEASURED.items():
        assert f'{len(SECTIONS[name].runs)} of the {len(SECTIONS[name].runs)} runs of this section' in text[title] and 'papermill nbs/run.ipynb' in text[title]
        assert 'Verdict' not in text[title]
    for title, command in {'The held-out rows': 'medpeft study held_out', 'Whether a run repeats itself': 'python -m medpeft_study.again'}.items(): assert command in text[title] and 'Verdict' not in text[title]
    assert all(command in text['At full scale, without the weights'] for command in ('python -m medpeft_study.measure penalty', 'python -m medpeft_study.measure steps', 'medpeft study rehearsal'))
    assert {f.split('.')[0] for f in files} == {'audit_pipelines'} # arithmetic needs no record


def test_with_some_records_a_section_shows_them_and_says_what_is_missing(root, tmp_path, world, monkeypatch):
    some = [(r, m) for r, m in world if r['config']['seed'] == 0 and r['config']['alpha'] != 64]
    text, files = page(root, laid(root, tmp_path, some), monkeypatch)
    for title, name in MEASURED.items(): assert re.search(r'\d+ of the \d+ runs of this section are not there yet', text[title]), title
    assert 'alpha 8: ' in text[SECTIONS['knobs'].title] and 'alpha 64' not in text[SECTIONS['knobs'].title]
    assert 'one seed, no interval): **the data cannot tell**' in text[SECTIONS['allocator'].title]
    assert 'Verdict' not in text[SECTIONS['parts'].title] and 'audit_parts.svg' not in files and 'audit_effects.svg' in files


def test_with_all_records_nothing_is_missing_and_verdicts_follow_the_rule(root, tmp_path, world, monkeypatch):
    beyond(root, laid(root, tmp_path, world))
    text, files = page(root, tmp_path, monkeypatch)
    for title in MEASURED: assert 'Verdict' in text[title] and 'not there yet' not in text[title], title
    says = lambda section, words, verdict: any(words in line and f'**{verdict}**' in line for line in text[SECTIONS[section].title].split('\n'))
    assert says('allocator', 'gradients zero', 'the loss rises') and says('allocator', 'never called', 'the loss falls') and says('allocator', 'tfinal', 'no difference that matters')
    assert says('capacity', 'QLoRA, rank 8, alpha 2:', 'the loss rises') and says('capacity', 'uniformly', 'no difference that matters')
    assert says('rates', 'Each at its best (QLoRA 0.002, AdaLoRA 0.002)', 'it is higher')
    padding = text[SECTIONS['padding'].title]
    assert 'No share of padding' in padding and 'would take 9' in padding
    assert {f'audit_{name}.svg' for name in ('effects', 'windows', 'rates', 'ranks', 'parts', 'course')} | {f'audit_{name}.csv' for name in ('held_out', 'course', 'rehearsal', 'again')} < files
    assert '2 runs, whose' in text['The held-out rows'] and '17 of the 19 runs' in text['The held-out rows'] and 'No other committed run' in text['The held-out rows'] and 'AdaLoRA against QLoRA, on the held-out rows: loss +' in text['The held-out rows']
    scale = text['At full scale, without the weights']
    assert scale.count('in 3 of 3 cases') == scale.count('depends on the gradients of a task') == 2 and '2 of the 4 runs of the rehearsal' in scale
    assert '1 of 1 runs made again came out within the tolerance, 1 with equal numbers throughout: **they repeat**' in text['Whether a run repeats itself']


def test_a_verdict_turns_with_the_records(root, tmp_path, world, monkeypatch):
    turned = copy.deepcopy([(r, m) for r, m in world if r['run_id'] in {r['run_id'] for r in Runs([r for r, _ in world]).of(SECTIONS['allocator'])}])
    for r, _ in turned:
        if r['config']['allocator'] != 'zeroed': continue
        for m in r['metrics']: m['value'] -= 2.2 * ((m['when'], m['metric'], m['protocol'], m['domain']) == ('after', 'loss', 'answer', 'all'))
    text, _ = page(root, laid(root, tmp_path, turned), monkeypatch)
    line = next(x for x in text[SECTIONS['allocator'].title].split('\n') if 'gradients zero' in x)
    assert '**the loss falls**' in line


def test_the_report_does_not_see_the_audit(root, tmp_path, world):
    folder = laid(root, tmp_path, world[:20])
    for path in (root / 'reports' / 'records').glob('*.json'): (folder / 'records' / path.name).write_bytes(path.read_bytes())
    assert load_records(folder) == load_records(root / 'reports')
    assert len(load_records(folder, audit=True)) == len(load_records(root / 'reports', audit=True)) + 20


def test_what_another_study_has_run_is_found_and_not_asked_for(root):
    runs = Runs(load_records(root / 'reports'))
    assert not runs.missing(SECTIONS['ranks'])
    assert len([p for p in STUDIES['audit'].runs if not runs.get(p)]) <= 144
    assert sum('-p windows 128,256,512,1024' in command(p) for p in STUDIES['audit'].runs) == len(SECTIONS['padding'].runs) == 9


@pytest.mark.parametrize('method, values', [
    ('adalora', dict(loss_scope='sequence')), ('adalora', dict(allocator='early')), ('adalora', dict(allocator='zeroed')), ('adalora', dict(budget_end=.3)),
    ('adalora', dict(orth_weight=0.)), ('adalora', dict(orth_weight=2.)), ('qlora', dict(alpha=8.)), ('adalora', dict(importance_grad='task')), ('qlora', dict(rank=9, alpha=2.25)),
    ('adalora', dict(allocator='uniform')), ('adalora', dict(lr=1e-2)), ('qlora', dict(epochs=10)), ('adalora', dict(quantization='none')), ('adalora', dict(lr=2e-4, loss_scope='padded', allocator='never', max_length=128))])
def test_the_study_has_what_the_audit_asks(method, values):
    wanted = dict(method=method, lr=RATES[method]) | values
    found = [p for p in STUDIES['audit'].runs if all(p.get(k) == v for k, v in wanted.items())]
    assert {p['seed'] for p in found} >= {0, 1, 2}, wanted


def test_every_check_leads_to_its_evidence(root):
    cells = nbformat.read(root / 'nbs' / 'audit.ipynb', 4).cells
    slugs = {re.sub(r'[^a-z0-9 -]', '', c.source.split('\n')[0][3:].lower()).replace(' ', '-') for c in cells if c.source.startswith('## ')}
    checks = next(c.source for c in cells if c.source.startswith('## How to compare'))
    assert len(re.findall(r'^\d+\. ', checks, re.M)) == 10
    links = [re.findall(r'\]\(#([^)]+)\)', line) for line in checks.split('\n') if re.match(r'\d+\. ', line)]
    assert all(links) and {x for line in links for x in line} <= slugs

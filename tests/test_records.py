"The committed records: each valid, each named after its own config, each number in it made again from its predictions"

import pandas as pd
import pytest

from medpeft_study.config import RunConfig, project_root, run_id
from medpeft_study.records import read_record
from medpeft_study.reporting import metric_value
from medpeft_study.study import STUDIES, run_name

RECORDS = sorted((project_root() / 'reports' / 'records').glob('*.json'))


@pytest.fixture(params=RECORDS, ids=lambda p: p.stem)
def record(request): return read_record(request.param)


def test_there_are_records(): assert RECORDS


def test_the_name_is_the_hash_of_the_config(record): assert run_id(RunConfig(**record['config'])) == record['run_id']


def test_it_belongs_to_a_study_and_was_made_by_papermill(record):
    assert record['study'] in STUDIES and record['status'] == 'complete'
    assert record['provenance']['command'].startswith('papermill nbs/run.ipynb')
    assert len(record['provenance']['commit']) == 40 and not record['provenance']['dirty']


def test_the_metrics_are_those_of_the_predictions(record, root):
    predictions = pd.read_parquet(root / 'reports' / 'predictions' / f"{record['run_id']}.parquet")
    for (split, when), part in predictions.groupby(['split', 'when']):
        value = lambda metric, protocol: metric_value(record, metric, when, protocol, split)['value']
        assert value('loss', 'answer') == pytest.approx(part.nll.sum() / part.n_tokens.sum())
        for protocol in ('text', 'text_norm', 'letter'): assert value('accuracy', protocol) == (part[protocol] == part.answer).mean()


@pytest.mark.parametrize('method', ['qlora', 'adalora'])
def test_twelve_steps_lower_the_validation_loss(method, root):
    record = read_record(root / 'reports' / 'records' / f"{run_name(dict(profile='smoke', method=method, device='cpu'))}.json")
    before, after = (metric_value(record, 'loss', when)['value'] for when in ('before', 'after'))
    assert before - after >= 0.3

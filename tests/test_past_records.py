"Records of every version that ever was, as they were written then"
import json
from copy import deepcopy

import pytest

from medpeft_study.records import MIGRATIONS, SCHEMA_VERSION, RecordError, is_complete, read_record, write_record

NAMES = ['v1-smoke-first', 'v1-mini', 'v1-toy-used', 'v1-toy-failed']


@pytest.fixture
def past(root): return root / 'tests' / 'data' / 'records'


def test_every_past_version_has_records(past):
    "A new version needs a migration, and a record of the version before it"
    assert sorted(NAMES) == sorted(p.stem for p in past.glob('*.json'))
    assert {json.loads((past / f'{n}.json').read_text())['schema'] for n in NAMES} == set(range(1, SCHEMA_VERSION)) == set(MIGRATIONS)


@pytest.mark.parametrize('name', NAMES)
def test_a_record_of_the_past_is_read_and_its_file_stays(past, name, tmp_path):
    before = (past / f'{name}.json').read_bytes()
    old, record = json.loads(before), read_record(past / f'{name}.json')
    assert record['schema'] == SCHEMA_VERSION and (past / f'{name}.json').read_bytes() == before
    for key in old.keys() - {'schema', 'resources'}: assert record[key] == old[key]
    if record['status'] == 'complete':
        assert old['resources'].items() <= record['resources'].items()
        assert record['resources']['used'] == {k: record['config'][k] for k in ('micro_batch_size', 'gradient_checkpointing')}
        assert is_complete(past / f'{name}.json')
    write_record(record, tmp_path / 'now.json')
    assert read_record(tmp_path / 'now.json') == record # and once forward, it stays


@pytest.mark.parametrize('name', NAMES)
def test_a_record_of_the_future_is_refused_in_one_sentence(past, name, tmp_path):
    newer = json.loads((past / f'{name}.json').read_text()) | dict(schema=SCHEMA_VERSION + 1)
    (tmp_path / 'newer.json').write_text(json.dumps(newer))
    with pytest.raises(RecordError, match='newer.json has schema 3, and this version of medpeft_study reads up to 2: update medpeft_study to read it.$'):
        read_record(tmp_path / 'newer.json')
    assert not is_complete(tmp_path / 'newer.json')


def test_a_migration_mends_nothing(past, tmp_path):
    "What was wrong in the old version is still wrong"
    old = json.loads((past / 'v1-mini.json').read_text())
    for change in (lambda r: r.pop('ranks'), lambda r: r['metrics'][0].update(value='1'), lambda r: r.update(surprise=1), lambda r: r.update(config=[])):
        broken = deepcopy(old)
        change(broken)
        (tmp_path / 'broken.json').write_text(json.dumps(broken))
        with pytest.raises(RecordError, match='broken.json'): read_record(tmp_path / 'broken.json')


def test_committed_records_are_all_read(root):
    paths = sorted((root / 'reports' / 'records').glob('*.json'))
    assert paths and {read_record(p)['schema'] for p in paths} == {SCHEMA_VERSION}

"The report is a function of the records: the same bytes from the same records, and an edit goes where it must and nowhere else"
import json
import os
import shutil
import subprocess
import sys
from hashlib import sha256

import pandas as pd
import pytest

from medpeft_study.generation import generated_metrics


def report(root, reports, expect=0, page='report'):
    "Run the report, or the speed page, as a user does, on a folder of records"
    env = dict(os.environ, MEDPEFT_REPORTS=str(reports), OMP_NUM_THREADS='2')
    done = subprocess.run([sys.executable, '-m', 'papermill', str(root / 'nbs' / f'{page}.ipynb')], env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (done.returncode == 0) == (expect == 0), done.stderr[-3000:]
    return done


def written(reports):
    "Path -> hash, of all that the report writes"
    files = [*(reports / 'tables').iterdir(), *(reports / 'figures').iterdir(), reports / 'numbers.json', reports / 'claims.json']
    return {str(f.relative_to(reports)): sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope='module')
def reports(root, tmp_path_factory):
    "A folder with the committed runs of two seeds, but for those that only the audit and the sweep look at, and what the report makes of them"
    folder = tmp_path_factory.mktemp('reports')
    for name in ('records', 'predictions'): (folder / name).mkdir()
    for path in (root / 'reports' / 'records').glob('*.json'):
        record = json.loads(path.read_text())
        if record['config']['seed'] > 1 or record['study'] in ('audit', 'held_out', 'methods_rate'): continue
        shutil.copy(path, folder / 'records')
        shutil.copy(root / 'reports' / 'predictions' / f'{path.stem}.parquet', folder / 'predictions')
    report(root, folder)
    return folder


def test_the_same_records_give_the_same_bytes(root, reports):
    before = written(reports)
    (reports / 'tables' / 'stray.csv').write_text('left over')
    report(root, reports)
    assert written(reports) == before
    assert (reports / 'runs' / 'report.ipynb').is_file()


def test_one_edited_loss_changes_table_figure_and_claim_and_nothing_else(root, reports, tmp_path):
    edited = tmp_path / 'reports'
    shutil.copytree(reports, edited)
    path = next(p for p in sorted((edited / 'records').glob('adalora-smollm2-*.json')) if (r := json.loads(p.read_text()))['study'] == 'mini')
    for m in r['metrics']:
        if (m['metric'], m['when'], m['domain']) == ('loss', 'after', 'all'): m['value'] -= 2 # now the lowest of all
    path.write_text(json.dumps(r))
    report(root, edited)
    before, after = written(reports), written(edited)
    changed = {f.partition('.')[0] for f in before.keys() | after.keys() if before.get(f) != after.get(f)}
    assert changed == {'tables/table3_results', 'figures/overview', 'figures/losses', 'figures/parameters', 'numbers', 'claims'}
    verdict = lambda folder: {c['name']: c['ours']['verdict'] for c in json.loads((folder / 'claims.json').read_text())}
    assert verdict(reports)['lower-loss'] == 'confirmed' and verdict(edited)['lower-loss'] != 'confirmed'
    assert f"{r['run_id']}: answer after training is" in (edited / 'runs' / 'report.ipynb').read_text() # and the forgery is named


def test_a_broken_record_stops_the_report_and_leaves_what_was_there(root, reports, tmp_path):
    broken = tmp_path / 'reports'
    shutil.copytree(reports, broken)
    path = sorted((broken / 'records').glob('*.json'))[0]
    path.write_text(path.read_text()[:1000])
    done = report(root, broken, expect=1)
    assert f'{path.name} is not a whole JSON file' in done.stderr and 'Traceback' not in done.stderr
    assert written(broken) == written(reports)


def test_no_records_is_one_sentence(root, tmp_path):
    assert 'There is no finished run in' in report(root, tmp_path, expect=1).stderr


def test_the_speed_page_and_the_report_leave_each_other_alone(root, reports, tmp_path):
    folder = tmp_path / 'reports'
    shutil.copytree(reports, folder)
    before = written(folder)
    shutil.copytree(root / 'reports' / 'bench', folder / 'bench')
    (folder / 'tables' / 'speed_stray.csv').write_text('left over')
    report(root, folder, page='bench_report')
    both = written(folder)
    assert {k: v for k, v in both.items() if '/speed_' not in k} == before
    assert {'tables/speed_targets.csv', 'tables/speed_steps.tex'} < both.keys() and 'tables/speed_stray.csv' not in both
    report(root, folder)
    numbers = json.loads((folder / 'numbers.json').read_text())
    assert {k: v for k, v in written(folder).items() if k != 'numbers.json'} == {k: v for k, v in both.items() if k != 'numbers.json'}
    assert {k: v for k, v in numbers.items() if not k.startswith(('speed/', 'penalty/'))} == json.loads((reports / 'numbers.json').read_text())
    assert numbers['speed/targets/qlora-fast/ms']['file'] == 'bench/steps.json'


def test_without_a_bench_the_speed_page_says_what_makes_it(root, tmp_path):
    report(root, tmp_path, page='bench_report')
    page = (tmp_path / 'runs' / 'bench_report.ipynb').read_text()
    assert 'reports/bench/contenders.json` is not there: `python -m medpeft_study' in page and '0 files in tables and figures' in page


def test_free_answers_are_shown_or_waited_for(root, tmp_path):
    "The page of samples without an answer, and with one run that answered: its text is text, and its table is written"
    report(root, tmp_path, page='samples')
    page = (tmp_path / 'runs' / 'samples.ipynb').read_text()
    assert 'No run holds free answers yet' in page and 'medpeft study methods' in page and '0 files in tables' in page
    path = next(p for p in sorted((root / 'reports' / 'records').glob('qlora-smollm2-*.json')) if json.loads(p.read_text())['study'] == 'mini')
    record, preds = json.loads(path.read_text()), pd.read_parquet(root / 'reports' / 'predictions' / f'{path.stem}.parquet')
    asked = preds.groupby(['split', 'when']).cumcount() < 30
    answers = pd.DataFrame(dict(generated=[f'<b>answer {i}</b>' for i in preds.index], exact_match=0., token_f1=.25, rouge_l=.5), preds.index)[asked]
    record['metrics'] += [m for when, part in answers.groupby(preds.when) for m in generated_metrics(part, 'validation', when)]
    for name in ('records', 'predictions'): (tmp_path / name).mkdir()
    (tmp_path / 'records' / path.name).write_text(json.dumps(record))
    preds.join(answers).to_parquet(tmp_path / 'predictions' / f'{path.stem}.parquet', index=False)
    report(root, tmp_path, page='samples')
    page = (tmp_path / 'runs' / 'samples.ipynb').read_text()
    assert '&lt;b&gt;answer 0&lt;/b&gt;' in page and '<b>answer' not in page and '4 files in tables' in page
    assert len(pd.read_csv(tmp_path / 'tables' / 'samples_scores.csv')) == 1

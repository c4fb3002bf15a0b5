"The results explorer in a real browser: what is shown, what is best, what is opened and downloaded"
import csv
import json
import re
import shutil
from collections import Counter
from copy import deepcopy

import nbformat
import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import served
from playwright.sync_api import expect

from medpeft_study.explorer_data import explorer_data, explorer_records, write_explorer
from medpeft_study.frames import load_records

BLUE, ORANGE = '#0173b2', '#de8f05'
# run -> method, seed, prompt, learning rate, seconds of training, accuracy by choice text. Of the first seven a is fastest,
# b and c are the same point, d and e lose to them on one axis alone, f is most accurate, g is worse than a on both;
# h, of another setting, would beat all of them.
RUNS = dict(a=('qlora', 0, 'open', 2e-4, 10., .5), b=('qlora', 1, 'open', 2e-4, 20., .6), c=('qlora', 2, 'open', 2e-4, 20., .6),
            d=('adalora', 0, 'open', 2e-4, 20., .55), e=('adalora', 1, 'open', 2e-4, 30., .6), f=('adalora', 2, 'open', 2e-4, 40., .7),
            g=('adalora', 0, 'open', 2e-3, 15., .4), h=('qlora', 0, 'lettered', 2e-4, 5., .8), i=('adalora', 0, 'lettered', 2e-4, 6., .7))
SHELL = '''<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>Explorer</title>
<link rel="icon" href="data:,">
<style>
body { margin: 0 1rem; font: 17px sans-serif; background: var(--bs-body-bg); color: var(--bs-body-color);
       --bs-body-bg: #fff; --bs-body-color: #212529; --bs-link-color: #0d6efd }
body.quarto-dark { --bs-body-bg: #222; --bs-body-color: #dee2e6; --bs-link-color: #6ea8fe }
</style></head><body class="quarto-light"><main><h1>Explorer</h1>MARKUP</main></body></html>'''


def synthetic(by_method):
    "The runs of `RUNS`, each a smoke run with other numbers"
    for name, (method, seed, prompt, lr, seconds, accuracy) in RUNS.items():
        r = deepcopy(by_method[method])
        r['run_id'] = name
        r['config'] |= dict(seed=seed, prompt=prompt, lr=lr)
        r['resources']['seconds']['training'], r['resources']['tokens_per_second'] = seconds, 1000 / seconds
        if name == 'f': r['resources']['energy'] = 3.5
        for m in r['metrics']:
            if m['when'] != 'after' or m['domain'] != 'all': continue
            if m['metric'] == 'accuracy' and m['protocol'] == 'text': m['value'] = accuracy
            if m['metric'] == 'loss': m['value'] = 2 - accuracy
        yield r


@pytest.fixture(scope='module')
def data():
    return explorer_data(list(synthetic({r['config']['method']: r for r in load_records() if r['study'] == 'smoke'})))


@pytest.fixture(scope='module')
def folder(tmp_path_factory, root, data):
    "The page as its notebook has it, with its assets, in a page without a site"
    folder = tmp_path_factory.mktemp('explorer')
    shutil.copytree(root / 'nbs' / 'assets', folder / 'assets')
    write_explorer(folder / 'assets')
    (folder / 'assets' / 'runs.js').write_text(f'window.RUNS = {json.dumps(data)};', encoding='utf-8')
    cells = '\n'.join(c.source for c in nbformat.read(root / 'nbs' / 'explorer.ipynb', 4).cells)
    (folder / 'index.html').write_text(SHELL.replace('MARKUP', re.search(r'```\{=html\}\n(.*?)```', cells, re.S)[1]), encoding='utf-8')
    return folder


@pytest.fixture(scope='module')
def address(folder):
    with served(folder) as base: yield f'{base}/index.html'


@pytest.fixture
def visit(browser, address):
    "Opens the explorer; at the end no page may have complained or asked another host"
    wrong, contexts = [], []

    def open_page(suffix='', url=address, width=1200):
        contexts.append(browser.new_context(viewport=dict(width=width, height=900)))
        page = contexts[-1].new_page()
        page.set_default_timeout(10_000)
        page.on('console', lambda m: wrong.append(m.text) if m.type in ('error', 'warning') else None)
        page.on('pageerror', lambda e: wrong.append(str(e)))
        page.on('request', lambda r: None if r.url.startswith((address.rsplit('/', 1)[0], 'file:', 'data:', 'blob:')) else wrong.append(r.url))
        page.goto(url + suffix)
        expect(points(page)).not_to_have_count(0)
        return page
    yield open_page
    for c in contexts: c.close()
    assert wrong == []


def points(page): return page.locator('.plot g.runs_marks path')
def colors(page): return Counter(p.get_attribute('fill') for p in points(page).all())
def live(page): return page.locator('[aria-live]')
def tick(page, group, name): page.get_by_role('group', name=group).get_by_label(re.compile(f'^{name}')).click()


def front(page, x, y):
    "The runs on the front, and how many points are ringed"
    page.get_by_label('Across (x)').select_option(x)
    page.get_by_label('Up (y)').select_option(y)
    page.evaluate("document.querySelector('.plot').drawn")
    assert f'{len(points(page).all())} runs' in page.locator('.plot').get_attribute('aria-label')
    return page.locator('.plot').get_attribute('data-front'), sum(p.get_attribute('stroke-width') == '2' for p in points(page).all())


def test_filters_change_points_count_and_counts(visit):
    page = visit()
    expect(points(page)).to_have_count(7) # the larger setting
    expect(live(page)).to_have_text('7 of 9 runs shown')
    tick(page, 'Method', 'AdaLoRA')
    expect(points(page)).to_have_count(4)
    expect(live(page)).to_have_text('4 of 9 runs shown')
    expect(page.get_by_role('group', name='Seed').locator('.count')).to_have_text(['2', '1', '1'])
    tick(page, 'Seed', '0')
    expect(points(page)).to_have_count(2)
    expect(page.locator('table.runs tbody tr')).to_have_count(2)
    page.get_by_role('button', name='Reset').click()
    expect(points(page)).to_have_count(7)
    page.locator('select[name=setting]').select_option('')
    expect(points(page)).to_have_count(9)
    expect(page.get_by_role('columnheader', name='Setting')).to_be_visible()


def test_filtering_never_recolours(visit):
    page = visit()
    assert colors(page) == {BLUE: 3, ORANGE: 4}
    tick(page, 'Method', 'AdaLoRA')
    expect(points(page)).to_have_count(4)
    assert colors(page) == {ORANGE: 4}
    shapes = {p.get_attribute('d') for p in points(page).all()}
    tick(page, 'Study', 'smoke')
    tick(page, 'Seed', '1')
    expect(points(page)).to_have_count(1)
    assert colors(page) == {ORANGE: 1} and {p.get_attribute('d') for p in points(page).all()} < shapes and len(shapes) == 2


def test_the_front_honours_each_direction_keeps_ties_and_stays_within_a_setting(visit):
    page = visit()
    for x, y in (('training_seconds', 'text'), ('training_seconds', 'loss'), ('tokens_per_second', 'text'), ('tokens_per_second', 'loss')):
        assert front(page, x, y) == ('a b c f', 4)
    tick(page, 'Method', 'AdaLoRA')
    assert front(page, 'training_seconds', 'text') == ('d e f g', 4)
    tick(page, 'Method', 'AdaLoRA')
    page.locator('select[name=setting]').select_option('')
    assert front(page, 'training_seconds', 'text') == ('a b c f h', 5)


def test_a_run_without_a_value_is_counted_and_not_drawn(visit):
    page = visit()
    page.get_by_label('Across (x)').select_option('energy')
    expect(points(page)).to_have_count(1)
    expect(live(page)).to_have_text('7 of 9 runs shown, 6 without a value on these axes')
    expect(page.locator('table.runs tbody tr')).to_have_count(7)


def test_the_table_opens_a_run_by_keyboard_and_closes_it(visit, data):
    page = visit()
    button = page.locator('table.runs tbody button[data-run=f]')
    button.focus()
    page.keyboard.press('Enter')
    details, run = page.locator('section.details'), next(r for r in data['runs'] if r['run_id'] == 'f')
    expect(details.get_by_role('heading', level=2)).to_be_focused()
    assert page.url.endswith('#run=f')
    expect(details.get_by_role('heading', level=2)).to_have_text('AdaLoRA, seed 2')
    expect(details.locator('.curve svg')).to_have_count(3) # task loss, penalty, total rank
    expect(details.locator('.map g.marks path')).to_have_count(len(run['ranks']['layers']) * len(run['ranks']['projections']))
    expect(details.locator('pre')).to_have_text(run['command'])
    config = dict(zip(details.locator('details dt').all_text_contents(), details.locator('details dd').all_text_contents()))
    assert set(config) == set(run['config']) and config['lr'] == '0.0002' and config['seed'] == '2'
    expect(page.locator('.plot g.layer_3_marks path')).to_have_count(1) # the opened run has a ring
    details.get_by_role('button', name='Close').click()
    expect(details).to_be_hidden()
    expect(button).to_be_focused()
    assert '#run' not in page.url


def test_a_point_opens_its_run(visit):
    page = visit()
    front(page, 'training_seconds', 'text')
    points(page).first.click() # the first run in the table's order: a
    expect(page.locator('section.details h2')).to_have_text('QLoRA, seed 0')
    expect(page.locator('section.details .curve svg')).to_have_count(1)


def test_an_address_opens_its_run(visit):
    page = visit('#run=h') # of a setting that is not shown
    expect(page.locator('section.details .setting')).to_contain_text('lettered prompt')
    page.evaluate("location.hash = '#run=nobody'")
    expect(page.locator('section.details')).to_contain_text('no finished run nobody')


def test_a_heading_sorts(visit):
    page = visit()
    order = lambda: [b.get_attribute('data-run') for b in page.locator('table.runs tbody button').all()]
    head = page.get_by_role('columnheader', name='time of training')
    head.get_by_role('button').click()
    expect(head).to_have_attribute('aria-sort', 'ascending')
    assert order() == list('agbcdef')
    head.get_by_role('button').click()
    expect(head).to_have_attribute('aria-sort', 'descending')
    assert order() == list('febcdga')


def test_the_download_holds_the_shown_runs(visit, data):
    page = visit()
    tick(page, 'Method', 'AdaLoRA')
    with page.expect_download() as download: page.get_by_role('button', name='Download CSV').click()
    rows = list(csv.DictReader(download.value.path().read_text(encoding='utf-8').splitlines()))
    runs = [r for r in data['runs'] if r['run_id'] in 'defg']
    assert [r['run_id'] for r in rows] == [r['run_id'] for r in runs]
    assert list(rows[0])[10:] == [m['key'] for m in data['metrics']]
    for row, run in zip(rows, runs):
        assert {k: row[k] for k in ('setting', 'arm', 'seed')} == {k: str(run[k]) for k in ('setting', 'arm', 'seed')}
        assert {k: float(row[k]) for k in run['metrics']} == run['metrics']
        assert (row['energy'] == '') == (row['run_id'] != 'f')


def test_the_theme_turns_with_the_page(visit):
    page = visit()
    ink = lambda: page.locator('.plot .role-axis-label text').first.get_attribute('fill')
    light = ink()
    page.evaluate("document.body.className = 'quarto-dark'")
    page.wait_for_function(f"document.querySelector('.plot .role-axis-label text')?.getAttribute('fill') !== '{light}'")
    assert colors(page) == {BLUE: 3, ORANGE: 4}


@pytest.mark.parametrize('theme', ['light', 'dark'])
def test_accessible_in_both_themes_on_a_narrow_screen_too(visit, theme):
    page = visit('#run=d', width=390)
    page.evaluate(f"document.body.className = 'quarto-{theme}'")
    page.locator('details summary').click()
    expect(page.locator('section.details .map svg')).to_be_visible()
    assert page.evaluate('document.documentElement.scrollWidth') <= 390
    found = [v for v in Axe().run(page).response['violations'] if v['impact'] in ('serious', 'critical')]
    assert [(v['id'], [n['html'] for n in v['nodes']]) for v in found] == []


def test_the_page_opens_from_a_disk(visit, folder):
    expect(points(visit(url=(folder / 'index.html').as_uri()))).to_have_count(7)


def test_the_committed_records_make_a_page(visit, folder, address):
    "With whatever runs lie in reports/records"
    write_explorer(folder / 'real')
    html = (folder / 'index.html').read_text(encoding='utf-8').replace('assets/runs.js', 'real/runs.js')
    (folder / 'real.html').write_text(html, encoding='utf-8')
    page = visit(url=address.replace('index', 'real'))
    expect(live(page)).to_contain_text(f'of {len(explorer_records())} runs shown')

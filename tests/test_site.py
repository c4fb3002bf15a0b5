"The site in a real browser: every page opens, asks nobody else for anything, and can be read"
import re
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import served
from playwright.sync_api import expect

from medpeft_study.config import project_root

SIDEBAR = (project_root() / 'nbs' / '_quarto.yml').read_text(encoding='utf-8')
PAGES = [re.sub(r'^\d\d[a-z]?_', '', name) for name in re.findall(r'(?:href: |- )([\w/]+)\.(?:ipynb|md)', SIDEBAR)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory, root):
    "The site, built from the notebooks as they are"
    folder = tmp_path_factory.mktemp('site') / 'docs'
    done = subprocess.run([sys.executable, '-m', 'medpeft_study.site', 'build', '--output', str(folder)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


@pytest.fixture(scope='module')
def address(folder):
    with served(folder) as base: yield base


@pytest.fixture
def visit(browser, address):
    "Opens a page; at the end none may have complained or asked another host"
    wrong, contexts = [], []

    def open_page(name, width=1440, scheme='light'):
        contexts.append(browser.new_context(viewport=dict(width=width, height=900), color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on('console', lambda m: wrong.append((name, m.text)) if m.type == 'error' else None)
        page.on('pageerror', lambda e: wrong.append((name, str(e))))
        page.on('request', lambda r: None if r.url.startswith((address, 'data:', 'blob:')) else wrong.append((name, r.url)))
        page.goto(f'{address}/{name}.html', wait_until='networkidle')
        return page
    yield open_page
    for c in contexts: c.close()
    assert wrong == []


class Links(HTMLParser):
    "What a page points at, and what can be pointed at in it"
    def __init__(self, text):
        super().__init__()
        self.targets, self.ids = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ('id', 'name') if attrs.get(k)}
        self.targets += [attrs[k] for k in ('href', 'src') if attrs.get(k)]


def test_every_page_is_there_and_no_other(folder):
    found = {str(p.relative_to(folder).with_suffix('')) for p in folder.rglob('*.html')}
    assert found == set(PAGES) and len(PAGES) == len(set(PAGES)) > 20, found ^ set(PAGES)


def test_every_link_within_the_site_resolves(folder):
    pages = {p: Links(p.read_text(encoding='utf-8')) for p in folder.rglob('*.html')}
    broken = []
    for page, links in pages.items():
        for target in links.targets:
            if urlsplit(target).scheme or target.startswith('//'): continue
            path, anchor = urldefrag(unquote(target))
            path = path.partition('?')[0]
            there = (page.parent / path).resolve() if path else page
            if there.is_dir(): there /= 'index.html'
            known = pages[there].ids if there in pages else None
            # the explorer reads what follows run= itself: the run must be among its records
            if anchor.startswith('run='): ok = (folder / 'assets' / 'records' / f'{anchor[4:]}.json').is_file()
            else: ok = there.exists() and (not anchor or known is None or anchor in known)
            if not ok: broken.append((page.name, target))
    assert broken == []
    assert sum(len(links.targets) for links in pages.values()) > 1000


@pytest.mark.parametrize('name', PAGES)
def test_a_page_opens_fits_narrow_and_wide_and_is_accessible_in_light_and_dark(visit, name):
    for width, scheme in ((1440, 'light'), (390, 'dark')):
        page = visit(name, width, scheme)
        assert page.evaluate('document.documentElement.scrollWidth') <= width, f'{name} is wider than {width} px'
        background = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
        assert (background < 100) == (scheme == 'dark')
        found = [(v['id'], v['nodes'][0]['html'][:200]) for v in Axe().run(page).response['violations'] if v['impact'] in ('serious', 'critical')]
        assert found == [], f'{name}, {width} px, {scheme}: {found}'


def test_search_finds_adalora(visit):
    page = visit('index')
    page.get_by_role('searchbox').fill('AdaLoRA')
    hits = page.locator('.smalldocs-search-results a, .aa-Item a')
    expect(hits.first).to_be_visible()
    assert 'adalora' in ' '.join(hits.all_inner_texts()).lower()
    hits.first.click()
    expect(page.locator('h1')).to_be_visible()


def test_maths_is_drawn_by_the_browser(visit, folder):
    for name in ('adapters', 'evaluation'):
        page = visit(name)
        boxes = [m.bounding_box() for m in page.locator('main math').all()]
        assert boxes and all(b['width'] > 4 and b['height'] > 4 for b in boxes)
    for path in folder.rglob('*.html'):
        assert not re.search(r'class="math (inline|display)"', path.read_text(encoding='utf-8')), path.name


def test_the_front_page_shows_figure_table_and_command(visit):
    page = visit('index')
    assert page.locator('main img').first.evaluate('i => i.naturalWidth') > 100
    for text in ('AdaLoRA', 'loss as PEFT reports it', 'make run'): expect(page.locator('main')).to_contain_text(text)


def test_a_filter_changes_the_points_of_the_explorer(visit):
    page = visit('explorer')
    points = page.locator('.plot g.runs_marks path')
    before = len(points.all())
    page.get_by_role('group', name='Method').get_by_label(re.compile('^QLoRA')).click()
    expect(points).not_to_have_count(before)
    assert 0 < len(points.all()) < before

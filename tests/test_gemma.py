"A second architecture: what Gemma 3 does otherwise than Llama, on its toy; and its real weights, where they are in the cache."
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from medpeft_study.adapters import attach
from medpeft_study.backbones import BACKBONES, load_backbone, load_tokenizer, resolve_backbone, supervised_logits
from medpeft_study.config import ConfigError, cache_dir, make_config
from medpeft_study.evaluation import Tree, branch_logprobs, predict
from medpeft_study.fused import PACKED
from medpeft_study.planning import shapes
from medpeft_study.prompts import collate, encode_item, encode_prompt, end_of_turn, frame
from medpeft_study.training import pack, task_loss


def moved(model):
    "The model with an adapter that changes its logits"
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.requires_grad: p.data.normal_(0, .2, generator=generator)
    return model.eval()


@pytest.fixture(params=['qlora', 'adalora'])
def toy(request, toy_config, toy_model):
    cfg = toy_config(request.param, backbone='toy-gemma3')
    return cfg, moved(toy_model(cfg)).get_base_model()


def own_loss(model, row):
    "Loss of a row alone, with the masks that transformers makes for each kind of layer"
    logits = model(torch.tensor([row.input_ids])).logits[0, row.n_prompt - 1:-1]
    return F.cross_entropy(logits, torch.tensor(row.input_ids[row.n_prompt:]), reduction='sum').item()


@torch.no_grad()
def test_packed_rows_have_the_loss_of_rows_alone(toy, toy_rows):
    cfg, model = toy
    rows = toy_rows[:6]
    assert task_loss(model, pack(rows, cfg, 257)).item() == pytest.approx(sum(own_loss(model, r) for r in rows), rel=1e-5)
    scope = replace(cfg, loss_scope='padded') # rows one below the other
    padded = model(**collate(rows, 'padded', 257, 64)).loss.item()
    assert task_loss(model, pack(rows, scope, 257)).item() / (6 * 63) == pytest.approx(padded, rel=1e-5)


@torch.no_grad()
def test_packed_attention_is_given_what_the_architecture_needs(toy, toy_rows, monkeypatch):
    "The kernel is there for CUDA only; this stands in for it"
    cfg, model = toy
    def by_rows(q, k, v, starts, _, most, __, scale, window_size): # [tokens, heads, width]
        assert window_size == (-1, 0) and scale == 48 ** -.5 and most == 40
        parts = [[x[a:b].transpose(0, 1) for x in (q, k, v)] for a, b in zip(starts, starts[1:])]
        return torch.cat([F.scaled_dot_product_attention(*p, is_causal=True, scale=scale, enable_gqa=True).transpose(0, 1) for p in parts])
    p = pack(toy_rows[:6], cfg, 257)
    want = task_loss(model, p).item()
    monkeypatch.setattr('torch.nn.attention.varlen.varlen_attn', by_rows)
    monkeypatch.setattr(model.config, '_attn_implementation', PACKED)
    assert task_loss(model, p, 40).item() == pytest.approx(want, rel=1e-5)


@torch.no_grad()
def test_branches_that_share_a_prompt_score_as_branches_alone(toy):
    _, model = toy
    tree = Tree(list(range(60, 80)), [[1, 2, 3], [4], [5, 6]])
    for branch, logps in zip(tree.branches, branch_logprobs(model, [tree], 257)[0]):
        alone = model(torch.tensor([tree.prompt + branch])).logits[0, len(tree.prompt) - 1:-1].log_softmax(-1)
        np.testing.assert_allclose(logps, alone[range(len(branch)), branch].numpy(), atol=1e-4)


@torch.no_grad()
def test_a_window_hides_nothing_of_a_row_that_fits_it_and_longer_rows_are_refused(monkeypatch, toy_config, toy_rows):
    narrow = BACKBONES['toy-gemma3'].architecture | dict(sliding_window=24)
    monkeypatch.setitem(BACKBONES, 'toy-gemma3', replace(BACKBONES['toy-gemma3'], architecture=narrow))
    with pytest.raises(ConfigError, match='max_length = 64 is more than the 24 tokens that layers of toy-gemma3 look back'): toy_config('qlora', backbone='toy-gemma3')
    cfg = toy_config('qlora', backbone='toy-gemma3', max_length=24)
    model = load_backbone(cfg)[0]
    fits, long = (next(r for r in toy_rows if lengths(len(r.input_ids))) for lengths in (lambda n: 22 <= n <= 24, lambda n: n > 30))
    ours = lambda row: task_loss(model, pack([row], cfg, 257)).item()
    assert ours(fits) == pytest.approx(own_loss(model, fits), rel=1e-5)
    assert abs(ours(long) - own_loss(model, long)) > 1e-4 # what the check is for


def test_random_weights_are_scaled_as_the_architecture_scales():
    model, _ = load_backbone(resolve_backbone(make_config('smoke', backbone='toy-gemma3', device='cpu')))
    assert model.model.embed_tokens.embed_scale.item() == pytest.approx(128 ** .5)
    x = torch.randn(2, 128)
    torch.testing.assert_close(model.model.norm(x), x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()) # one plus a weight of zero
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_shapes_and_targets(toy_config):
    s = shapes(make_config('paper', backbone='gemma3-270m'))
    assert (s.heads, s.head, s.embedding, s.layers) == (256 * (4 + 2), 0, 262144 * 640, 18)
    assert s.weights + s.embedding + s.rest == 268_098_176
    assert toy_config('adalora', backbone='toy-gemma3', target_modules='q_proj,v_proj').modules == ('q_proj', 'v_proj')


# --- the real one

SPEC = BACKBONES['gemma3-270m']
cached = lambda: any((cache_dir() / 'backbones').glob(f'gemma-3-270m-q4_k_m-{SPEC.revision[:8]}/model.safetensors'))
real = pytest.mark.skipif(not cached(), reason='Gemma 3 270M is 250 MB to download and not in the cache: run one with -p backbone gemma3-270m to have it there')
TOKENS = { # by llama.cpp, from the same file
    'Hello  world\n\nA  b': [9259, 138, 12392, 108, 236776, 138, 236763], 'in 2025': [495, 236743, 236778, 236771, 236778, 236810], 'a\tb': [236746, 255968, 236763],
    'naïve ☃ 𝔘 é   3': [1789, 238527, 560, 236743, 246690, 236743, 478, 395, 386, 390, 1559, 139, 236800], '<table>x</table>': [168, 236781, 176]}
PROMPT, GREEDY = 'The heart is a muscular organ that pumps', [ # token and log-probability by llama.cpp, from the same file dequantized to float32
    (4806, -.1309), (5459, -.8835), (506, -.2541), (2742, -.0795), (236761, -.3651), (1030, -1.0273), (563, -.6153), (496, -2.0624), (12763, -1.4409), (2030, -.2976), (600, -.5005)]
ITEM = dict(item_id='HP:0000958', domain='skin', question='Abnormally little moisture in the skin.', choices=['Dry skin', 'Thin skin', 'Cutis laxa', 'Redundant skin'], answer=0)


@pytest.fixture(scope='module')
def gemma():
    cfg = resolve_backbone(make_config('smoke', backbone='gemma3-270m', device='cpu', quantization='none'))
    return cfg, load_backbone(cfg)[0], load_tokenizer(cfg)


@real
def test_its_tokenizer_is_that_of_the_file(gemma):
    cfg, _, tokenizer = gemma
    for text, ids in TOKENS.items():
        assert tokenizer(text)['input_ids'] == [2, *ids] and tokenizer.decode(ids) == text
    assert (tokenizer.chat_template, frame(tokenizer), end_of_turn(tokenizer)) == (None, 'Question: {content}\nAnswer:', '<eos>')
    row = encode_item(tokenizer, ITEM, cfg)
    assert tokenizer.decode(row.input_ids) == '<bos>Question: Abnormally little moisture in the skin.\nAnswer: Dry skin<eos>'
    assert encode_prompt(tokenizer, ITEM, 'open') == row.input_ids[:row.n_prompt] and row.input_ids.count(2) == 1
    with pytest.raises(ValueError, match='its text holds <unused7>'): encode_prompt(tokenizer, ITEM | dict(question='<unused7>'), 'open')


@real
@torch.no_grad()
def test_its_probabilities_are_those_of_the_file(gemma):
    _, model, tokenizer = gemma
    ids = tokenizer(PROMPT)['input_ids']
    tokens = torch.tensor([ids + [t for t, _ in GREEDY]])
    where = torch.zeros_like(tokens, dtype=torch.bool)
    where[0, len(ids) - 1:-1] = True
    logp = supervised_logits(model, tokens, where).log_softmax(-1)
    assert logp.argmax(-1).tolist() == [t for t, _ in GREEDY]
    np.testing.assert_allclose(logp.max(-1).values.numpy(), [p for _, p in GREEDY], atol=5e-3)


@real
def test_it_can_be_adapted_and_scored(gemma):
    cfg, model, tokenizer = gemma
    adapted = attach(model, replace(cfg, method='adalora', rank=4, target_rank=2))
    assert sum(hasattr(m, 'lora_E') for m in adapted.modules()) == 7 * 18
    [found] = predict(adapted, tokenizer, [ITEM], cfg).to_dict('records')
    assert 1 < found['nll'] / found['n_tokens'] < 8 and len(found['letter_loglik']) == 4

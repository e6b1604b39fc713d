"""Where a weight stands, from its name, its shape and the configuration alone."""

from types import SimpleNamespace

import pytest

from tensorpeft.sites import Site, find_sites, group_by_tensor, shape_name

LLAMA = SimpleNamespace(model_type="llama", hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=10)
T5 = SimpleNamespace(model_type="t5", d_model=32, num_heads=4, d_kv=6)


def find(name: str, out: int, in_: int, config=LLAMA) -> Site:
    return find_sites([(name, out, in_)], config)[0]


@pytest.mark.parametrize(
    ("name", "block", "projection", "inner_is_out"),
    [
        ("model.layers.11.self_attn.q_proj", "model.layers.11.self_attn", "query", True),
        ("model.layers.11.self_attn.o_proj", "model.layers.11.self_attn", "output", False),
        ("bert.encoder.layer.0.attention.self.value", "bert.encoder.layer.0.attention", "value", True),
        ("bert.encoder.layer.0.attention.output.dense", "bert.encoder.layer.0.attention", "output", False),
        ("decoder.block.3.layer.0.SelfAttention.k", "decoder.block.3.layer.0.SelfAttention", "key", True),
        ("decoder.block.3.layer.1.EncDecAttention.k", "decoder.block.3.layer.1.EncDecAttention", "key", True),
        ("transformer.layer.2.attention.q_lin", "transformer.layer.2.attention", "query", True),
        ("transformer.h.2.attn.c_proj", "transformer.h.2.attn", "output", False),
    ],
)
def test_attention(name: str, block: str, projection: str, inner_is_out: bool):
    site = find(name, 40, 40)
    assert (site.kind, site.block, site.projections) == ("attention", block, (projection,))
    assert site.inner_is_out is inner_is_out
    assert (site.heads, site.head_dim) == ((4,), 10)


@pytest.mark.parametrize(
    ("name", "out", "in_", "block", "projection", "inner_is_out"),
    [
        ("model.layers.1.mlp.gate_proj", 96, 32, "model.layers.1", "mlp.gate_proj", True),
        ("model.layers.1.mlp.down_proj", 32, 96, "model.layers.1", "mlp.down_proj", False),
        ("model.layers.1.mlp.down_proj", 32, 32, "model.layers.1", "mlp.down_proj", False),  # by name where equal
        ("model.layers.1.mlp.up_proj", 32, 32, "model.layers.1", "mlp.up_proj", True),
        ("bert.encoder.layer.1.output.dense", 32, 96, "bert.encoder.layer.1", "output.dense", False),
        ("model.layers.1.mlp.experts.5.up_proj", 96, 32, "model.layers.1.mlp.experts.5", "up_proj", True),
        ("decoder.block.0.layer.2.DenseReluDense.wo", 32, 96, "decoder.block.0.layer.2", "DenseReluDense.wo", False),
    ],
)
def test_mlp(name: str, out: int, in_: int, block: str, projection: str, inner_is_out: bool):
    site = find(name, out, in_)
    assert (site.kind, site.block, site.projections) == ("mlp", block, (projection,))
    assert (site.inner_is_out, site.model_dim, site.inner_dim) == (inner_is_out, 32, 96 if 96 in (out, in_) else 32)


def test_the_number_of_heads_is_that_of_the_weight():
    assert find("model.layers.0.self_attn.k_proj", 20, 32).heads == (2,)
    assert find("encoder.block.0.layer.0.SelfAttention.q", 24, 32, T5).heads == (4,)
    assert find("encoder.block.0.layer.0.SelfAttention.q", 24, 32, T5).head_dim == 6  # not 32 / 4
    unknown = find("layers.0.attn.q_proj", 20, 32, None)
    assert (unknown.kind, unknown.heads, unknown.head_dim) == ("attention", None, None)


def test_a_fused_projection_is_split_where_its_rows_are_known():
    phi3 = SimpleNamespace(**{**vars(LLAMA), "model_type": "phi3"})
    site = find("model.layers.0.self_attn.qkv_proj", 80, 32, phi3)
    assert (site.projections, site.heads, site.interleaved) == (("query", "key", "value"), (4, 2, 2), False)
    assert site.is_fused
    unknown = find("model.layers.0.self_attn.qkv_proj", 80, 32)  # Llama has no such layer
    assert unknown.is_fused
    assert unknown.projections == ()
    wrong_size = find("model.layers.0.self_attn.qkv_proj", 50, 32, phi3)
    assert wrong_size.projections == ()


def test_outside_the_layers_a_transformer_has_no_sites():
    assert find("lm_head", 100, 32).kind is None
    assert find("bert.pooler.dense", 32, 32).kind is None
    assert find("lin0", 20, 10, None).kind == "plain"


def test_groups_keep_the_order():
    sites = find_sites([("a.0.x", 4, 2), ("a.0.y", 2, 4), ("a.1.x", 4, 2)])
    groups = group_by_tensor(sites, shape_name)
    assert {name: [site.name for site in group] for name, group in groups.items()} == {
        "4x2": ["a.0.x", "a.1.x"],
        "2x4": ["a.0.y"],
    }


def test_many_tensors_are_named_without_comparing_each_with_all():
    compared = 0

    class Key(str):
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

    sites = [Site(f"experts.{k}", 4, 4) for k in range(100)]
    assert len(group_by_tensor(sites, lambda site: Key(site.name))) == 100
    assert compared < 1000

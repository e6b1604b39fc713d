"""A model's weights to adapt, as a method sees them: where each stands, never in which architecture.

Found from what every model has, the names and shapes of its linear layers and its configuration. No torch, no PEFT.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

Kind = Literal["attention", "mlp", "plain"]
# The last part of a layer's name inside an attention block -> what it projects. A linear layer called otherwise there
# is in no role that we know.
_ATTENTION_ROLES = {
    **dict.fromkeys(("q", "q_proj", "q_lin", "query", "query_proj", "wq", "to_q"), "query"),
    **dict.fromkeys(("k", "k_proj", "k_lin", "key", "key_proj", "wk", "to_k"), "key"),
    **dict.fromkeys(("v", "v_proj", "v_lin", "value", "value_proj", "wv", "to_v"), "value"),
    **dict.fromkeys(("o", "o_proj", "out_proj", "out_lin", "c_proj", "dense", "wo", "Wo", "to_out"), "output"),
}
_QKV = ("query", "key", "value")
# Fused projections whose rows we know the order of: (model type, name) -> whether each head has its query, key and
# value rows together ("interleaved") or all queries come first, then all keys ("stacked").
_FUSED: dict[tuple[str, str], Literal["stacked", "interleaved"]] = {
    ("gpt2", "c_attn"): "stacked",
    ("phi3", "qkv_proj"): "stacked",
    ("mpt", "Wqkv"): "stacked",
    ("modernbert", "Wqkv"): "stacked",
    ("gpt_neox", "query_key_value"): "interleaved",
    ("bloom", "query_key_value"): "interleaved",
    ("persimmon", "query_key_value"): "interleaved",
}


@dataclass(frozen=True)
class Convolution:
    """What makes a layer a convolution.

    Args:
        kernel: sizes of the kernel's axes, one to three.
        stride: as `torch.nn.functional.conv2d` takes it.
        padding: likewise, with zeros.
        dilation: likewise.
        groups: likewise.
        border: what the input is padded with first, where not with zeros: as `torch.nn.functional.pad` takes it, and
            its mode.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    border: tuple[tuple[int, ...], Any] | None = None


@dataclass(frozen=True)
class Site:
    """One weight (out, in) that an adapter adapts.

    Args:
        name: full name of the linear layer in the model, such as `model.layers.0.self_attn.q_proj`.
        out: output features (channels), the rows of its weight.
        in_: input features (channels), the columns.
        kind: the sort of block that it stands in. "plain": a weight of a model that is not a transformer (no
            configuration) and has no list of layers there. None: a transformer's weight outside its layers.
        block: full name of that block, such as `model.layers.0.self_attn`. Cross attention is a block of its own.
        projections: what it projects: "query", "key", "value", "output", or the layer's name in an MLP. A fused
            projection has several; none where a fused projection's rows are in an unknown order.
        interleaved: of a fused projection: each head, in an MLP each hidden unit, has its rows of all projections
            together.
        inner_is_out: whether the heads (in an MLP: the hidden units) are on the output side.
        heads: the number of heads of each projection; None where the configuration does not say it.
        head_dim: features of a head, from the configuration; None where that does not say it.
        convolution: of a convolution; None: the layer is linear. Only methods that say so get any.
        tower: full name of the part of a composite model that it is in, such as `vision_model`; "": of no part.
    """

    name: str
    out: int
    in_: int
    kind: Kind | None = None
    block: str = ""
    projections: tuple[str, ...] = ()
    interleaved: bool = False
    inner_is_out: bool = True
    heads: tuple[int, ...] | None = None
    head_dim: int | None = None
    convolution: Convolution | None = None
    tower: str = ""

    @property
    def num_columns(self) -> int:
        """The columns of its weight as a matrix: of a convolution, input channels of a group times the kernel."""
        if self.convolution is None:
            return self.in_
        return self.in_ // self.convolution.groups * prod(self.convolution.kernel)

    @property
    def model_dim(self) -> int:
        """The size of the side that reads or writes the hidden states."""
        return self.in_ if self.inner_is_out else self.out

    @property
    def inner_dim(self) -> int:
        """The size of the side of the heads or of the hidden units."""
        return self.out if self.inner_is_out else self.in_

    @property
    def is_fused(self) -> bool:
        """Whether it projects to queries, keys and values in one."""
        return self.kind == "attention" and len(self.projections) != 1


def find_sites(
    shapes: Iterable[tuple[str, int, int]],  # full name of a linear layer, out, in
    config: Any = None,  # the configuration of the model, or of the tower, if it has one
    tower: str = "",  # that all of them are in
) -> list[Site]:
    """The sites of these linear layers, in their order. Never fails: what is not known stays empty.

    >>> site = find_sites([("model.layers.3.self_attn.o_proj", 64, 32)])[0]
    >>> site.kind, site.block, site.projections, site.inner_is_out
    ('attention', 'model.layers.3.self_attn', ('output',), False)
    """
    inside = f"{tower}." if tower else ""
    found = (_find_site(Site(name.removeprefix(inside), out, in_), config) for name, out, in_ in shapes)
    return [
        replace(site, name=f"{inside}{site.name}", block=site.block and f"{inside}{site.block}", tower=tower)
        for site in found
    ]


def _find_site(site: Site, config: Any) -> Site:
    match = re.match(r"(?:.*?\.)?\d+(?=\.)", site.name)
    if match is None:  # outside the list of layers: a head, a pooler
        return site if hasattr(config, "model_type") else replace(site, kind="plain", projections=(site.name,))
    parts = site.name.split(".")
    start = match.group().count(".") + 1  # parts of the name up to the layer's number
    for end in range(start, len(parts) - 1):
        if "attn" in parts[end].lower() or "attention" in parts[end].lower():
            return _find_projection(replace(site, kind="attention", block=".".join(parts[: end + 1])), config)
    last_number = max(k for k, part in enumerate(parts) if part.isdigit())
    path = ".".join(parts[last_number + 1 :])
    # The hidden layer of an MLP is the wider side; one of equal sides counts by its name.
    leaves = r"(^|\.)(down_proj|fc2|fc_out|c_proj|output\.dense|wo|Wo|lin2|dense_4h_to_h|w2|ff\.net\.2)$"
    inner_is_out = site.out > site.in_ if site.out != site.in_ else re.search(leaves, path) is None
    hidden = _number(config, "hidden_size", "d_model")
    if "experts" in parts and (site.out == hidden) != (site.in_ == hidden):  # an expert is often narrow
        inner_is_out = site.in_ == hidden
    block = ".".join(parts[: last_number + 1])
    # A gate and an up-projection in one, as in Phi-3 and ModernBERT: first the rows of one, then those of the other.
    projections = (f"{path}.1", f"{path}.2") if parts[-1] in ("gate_up_proj", "Wi") else (path,)
    return replace(site, kind="mlp", block=block, projections=projections, inner_is_out=inner_is_out)


def _find_projection(site: Site, config: Any) -> Site:
    leaf = site.name.removesuffix(".0").rpartition(".")[2]
    hidden, num_heads = _number(config, "hidden_size", "d_model"), _number(config, "num_attention_heads", "num_heads")
    head_dim = _number(config, "head_dim", "d_kv", "attention_head_size")
    if head_dim is None and hidden and num_heads:
        head_dim = hidden // num_heads
    site = replace(site, head_dim=head_dim)
    role = _ATTENTION_ROLES.get(leaf)
    if role is not None:
        site = replace(site, projections=(role,), inner_is_out=role != "output")
        return replace(site, heads=(site.inner_dim // head_dim,)) if head_dim else site
    layout = _FUSED.get((str(getattr(config, "model_type", "")), leaf))
    if layout is None or head_dim is None or num_heads is None:
        return site
    num_kv_heads = _number(config, "num_key_value_heads") or num_heads
    heads = (num_heads, num_kv_heads, num_kv_heads)
    if sum(heads) * head_dim != site.out:
        return site  # such as the c_attn of a cross attention, which has no queries
    return replace(site, projections=_QKV, heads=heads, interleaved=layout == "interleaved")


def _number(config: Any, *names: str) -> int | None:
    """The first of these fields that is a positive integer; of a multimodal model, its text model's."""
    get_text_config = getattr(config, "get_text_config", None)
    for candidate in (config, get_text_config() if callable(get_text_config) else None):
        for name in names:
            value = getattr(candidate, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def group_by_tensor(
    sites: Iterable[Site],
    key: Callable[[Site], str],  # what the sites of one tensor have in common
) -> dict[str, list[Site]]:
    """The sites of each tensor that layers share, in their order, by its name: those of one key and one tower.

    The name is the key or, where several towers have it, the tower's and the key.

    >>> sites = [Site("a.0.x", 4, 2, tower="a"), Site("b.0.x", 4, 2, tower="b"), Site("b.0.y", 4, 4, tower="b")]
    >>> list(group_by_tensor(sites, shape_name))
    ['a_4x2', 'b_4x2', '4x4']
    """
    groups: dict[tuple[str, str], list[Site]] = {}
    for site in sites:
        groups.setdefault((site.tower, key(site)), []).append(site)
    towers = Counter(key for _, key in groups)
    return {
        # Without dots: PEFT would take a part of a parameter's name for the adapter's.
        key if towers[key] == 1 else f"{tower.replace('.', '_')}_{key}": group
        for (tower, key), group in groups.items()
    }


def shape_name(site: Site) -> str:
    """The shape of a weight, `"1024x4096"`."""
    return f"{site.out}x{site.in_}"

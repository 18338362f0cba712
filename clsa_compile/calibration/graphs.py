"""A model's forward as graphs: captured once a length, rewritten for a plan, and run as they are."""

from __future__ import annotations

import hashlib
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from clsa_compile.calibration import attend
from clsa_compile.capture.dynamo import GraphBreak, capture
from clsa_compile.errors import ClsaError, OptionError
from clsa_compile.ir.captured import Captured
from clsa_compile.ir.fingerprint import content_hash
from clsa_compile.ir.ops import contract_op
from clsa_compile.ir.plan import Plan
from clsa_compile.ir.routing import Index, Layer, Pool, Request, Shares, Sharing
from clsa_compile.ir.scores import Score, parse_score
from clsa_compile.ir.sites import AttentionSite
from clsa_compile.passes.borrow import Constants, index_operands, product
from clsa_compile.passes.emit import Emitter
from clsa_compile.passes.group import index_owners, plan
from clsa_compile.passes.pipeline import decide
from clsa_compile.passes.rewrite import rewrite
from clsa_compile.passes.route import UNMADE, layer, routed, shareable
from clsa_compile.passes.tidy import drop_dead

__all__ = ["Change", "Forward", "Graph", "IndexTap", "Probe", "Probed", "Tap"]

aten = torch.ops.aten

# Sees an attention of a run: its layer (counted among those that may share), what it read, its output, and
# the tokens it attended to where those were chosen. What it returns goes on in place of the output.
Tap = Callable[[int, attend.Operands, Tensor, attend.Tokens | None], Tensor]

# Sees an index of the model's own: its operands, of which k is its keys, its weight of heads, its score.
IndexTap = Callable[[attend.Operands, Tensor | None, Score], None]

# What is asked of dense layers, or of those with indexers.
Change = Request | Sharing
# What graphs do with mass on its way to a selection.
_OF_MASS = {
    aten.add.Tensor: attend.Mass.__add__,
    aten.slice.Tensor: lambda mass, _, start, end: mass.sets(start, end),
}
# Arguments of an `attention_mass` that may read some tokens only.
_WITH_INDICES = 13
# Where a `sparse_attention` says up to how many tokens it is dense, counted from its mask.
_WITH_DENSE_BELOW = 8
_PRODUCTS = (aten.linear.default, aten.matmul.default, aten.mm.default)
# What may follow the head's product: row by row, with constants.
_POINTWISE = (
    aten.alias.default,
    aten.contiguous.default,
    aten.div.Scalar,
    aten.div.Tensor,
    aten.mul.Scalar,
    aten.mul.Tensor,
    aten.tanh.default,
    aten.to.dtype,
    aten._to_copy.default,
)


class _Stop(BaseException):
    """Ends a captured call before it computes anything."""


@dataclass(frozen=True, slots=True)
class _Cut:
    """A model's forward as a graph that ends before the head, and what its run needs."""

    module: GraphModule
    inputs: tuple[Any, ...]
    slot: int
    layers: tuple[int | None, ...]
    head: GraphModule | None

    def logits(self, hidden: Tensor, others: tuple[Any, ...]) -> Tensor:
        """Returns the logits [1, n, V] of hidden states [1, n, E]."""
        return hidden if self.head is None else self.head(hidden, *others)


@dataclass(frozen=True, slots=True)
class Graph(_Cut):
    """One rewritten graph, cut before the head: `run` gives hidden states, `logits` those of a few rows.

    weights: by input, the name of the model's weight that it is. pools: who attends to whose tokens in it, by
    layers that may share; what was asked for and refused is not among them. Those of the model's own indices
    have no sources.
    """

    weights: Mapping[int, str]
    pools: tuple[Pool, ...]

    def run(
        self,
        ids: Tensor,
        tap: Tap | None = None,
        index_tap: IndexTap | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Returns the hidden states [1, T, E] of ids [1, T], and what the head reads besides.

        `tap` sees the attentions of all layers that may share, as they run, and `index_tap` the model's own
        indices; with it these select all that may be read. `tensors` are read in place of weights, by name.
        Without gradients unless they are enabled; the model's own weights get none.
        """
        given = list(self.inputs)
        given[self.slot] = ids
        for at, name in self.weights.items():
            if tensors is not None and name in tensors:
                given[at] = tensors[name].to(given[at])
        hidden, *others = _Run(self.module, self.layers, tap, index_tap=index_tap).run(*given)
        return hidden, tuple(others)

    def index_weights(self) -> list[str]:
        """Returns the names of the weights that only the model's own indices are made of."""
        only: set[Node] = set()
        for node in reversed(self.module.graph.nodes):
            ends = contract_op(node.target) == "index_topk"
            if ends or (node.op != "output" and node.users and all(u in only for u in node.users)):
                only.add(node)
        inputs = [node for node in self.module.graph.nodes if node.op == "placeholder"]
        return [name for at, name in self.weights.items() if inputs[at] in only]


@dataclass(frozen=True, slots=True)
class Probed:
    """What a probe found: hidden states [1, T, E], what the head reads besides, and indices' operands.

    operands: of each index q [1, Hi, T, D], k [1, n, T, D] and weight [1, Hi, T].
    """

    hidden: Tensor
    others: tuple[Any, ...]
    operands: list[tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Probe(_Cut):
    """A model's forward that gives the operands of indices besides, in their order.

    read: how many outputs the head reads. attributes: by name, where the graph reads indices' tensors.
    """

    read: int
    attributes: Mapping[str, str]

    def run(self, ids: Tensor, tap: Tap, tensors: Mapping[str, Tensor]) -> Probed:
        """Runs the model over ids [1, T].

        `tensors` are the weights of the indices, which get gradients where these are enabled.
        """
        given = list(self.inputs)
        given[self.slot] = ids
        read = {at: tensors[name].to(getattr(self.module, at)) for name, at in self.attributes.items()}
        hidden, *found = _Run(self.module, self.layers, tap, read).run(*given)
        others, made = found[: self.read - 1], found[self.read - 1 :]
        operands = [(made[i], made[i + 1], made[i + 2]) for i in range(0, len(made), 3)]
        return Probed(hidden, tuple(others), operands)


class Forward:
    """A model's forward over ids [1, T] for one T. Raises OptionError for a model that cannot share.

    layers: those that may share. topk: tokens that the model's own indexers select, 0 for a dense model;
    owners: then for each layer the one whose index it reads.
    """

    def __init__(self, model: Any, ids: Tensor) -> None:
        self._source, self._inputs, self._slot, self._weights = _traced(model, ids)
        paths = {} if not isinstance(model, torch.nn.Module) else dict(model.named_modules())
        captured = capture(self._source)
        self._sites = decide(captured).sites
        attentions = self._sites.attention
        able = [site for site in attentions if site.indexer is not None]
        self.topk = max((site.indexer.topk for site in able if site.indexer is not None), default=0)
        self.owners = tuple(index_owners(able))
        if not able:
            able = shareable(attentions)
        _refuse(attentions, able)
        found = [layer(site) for site in able]
        self.ordinals = tuple(entry.ordinal for entry in found)
        self.layers = tuple(_named(entry, i, paths) for i, entry in enumerate(found))
        self.attentions = len(attentions)

    def identity(self) -> str:
        """Returns a hash of what is computed: the graph, and all bits of the weights and tables it reads."""
        given = (x for i, x in enumerate(self._inputs) if i != self._slot and isinstance(x, Tensor))
        text = str(self._source.graph)
        return hashlib.sha256(f"{text}{content_hash((*given, *self._source.buffers()))}".encode()).hexdigest()

    def graph(self, change: Change | None = None) -> Graph:
        """Returns the graph rewritten for what was asked of its layers; without a change, as the model is."""
        captured = capture(self._source)
        request = change if isinstance(change, Request) else None
        sharing = None if isinstance(change, Request) else change
        decision = decide(captured, sharing, request=request)
        rewrite(captured, decision.sites, decision.plan, decision.tensors)
        members = {m for pool in decision.plan.pools for m in pool.members}
        positions = self._positions
        ordinals = _sites_of(captured, [site.ordinal for site in decision.sites.attention], members)
        layers = tuple(None if o is None else positions.get(o) for o in ordinals)
        found = captured.module, self._inputs, self._slot, layers, _cut(captured)
        return Graph(*found, self._weights, _pools(decision.plan, positions))

    def breaks(self) -> dict[int, str]:
        """Returns why layers with an indexer cannot read the index of the one before them that has one.

        A layer can read that of any earlier one where there is no break between them.
        """

        def chained(owners: Sequence[int], _: Sequence[Layer]) -> Shares:
            choosers = [i for i, owner in enumerate(owners) if owner == i]
            before = dict(zip(choosers, (choosers[0], *choosers), strict=False))
            return Shares(tuple(before[owner] for owner in owners))

        found = plan(self._sites, chained)
        followers = {self._positions[ordinal] for ordinal in found.shares}
        reasons = {entry.ordinal: entry.reason for entry in found.sites}
        kept: dict[int, str] = {}
        for i, owner in enumerate(self.owners):
            # It keeps its index where any layer that reads it could not read the other one.
            if owner not in followers | {0}:
                kept[owner] = kept.get(owner) or reasons[self.ordinals[i]]
        return kept

    def unable(self) -> dict[int, str]:
        """Returns why layers cannot begin a group that reads an index; those that can are not among them."""
        tensors: dict[str, Tensor] = {}
        pools = []
        for site in (s for s in self._sites.attention if s.ordinal in self.ordinals):
            index = Index(str(site.ordinal), "", 0, 1)
            pools.append(Pool(site.ordinal, 1, {}, (site.ordinal,), index=index))
            if not isinstance(made := product(site), str):
                weight, rows = (node.meta["val"] for node in (made.weight, made.rows))
                shapes = weight.shape, (1, rows.shape[-1]), (1,)
                empty = (torch.empty(shape, device="meta") for shape in shapes)
                tensors.update(zip(index.tensor_names(), empty, strict=True))
        request = Request(lambda _: tuple(pools), prompts=True, tensors=tensors)
        _, kept = routed(self._sites.attention, request)
        return {self.ordinals.index(o): why.removeprefix(UNMADE).strip() for o, why in kept.items()}

    @property
    def _positions(self) -> dict[int, int]:
        return {ordinal: i for i, ordinal in enumerate(self.ordinals)}

    def probe(self, pools: Sequence[Pool], tensors: Mapping[str, Tensor]) -> Probe:
        """Returns the model's own forward with the indices of pools, which count layers that may share."""
        captured = capture(self._source)
        decision = decide(captured)
        sites = {site.ordinal: site for site in decision.sites.attention}
        self._refuse_unmade(decision.sites.attention, pools, tensors)
        constants = Constants(captured, tensors)
        wanted: list[Node] = []
        for pool in pools:
            site = sites[self.ordinals[pool.anchor]]
            assert pool.index is not None
            with captured.graph.inserting_before(site.out):
                wanted += index_operands(Emitter(captured, site.out), site, pool.index, constants)
        # Among the outputs, rewriting leaves them as they are.
        output = next(node for node in captured.graph.nodes if node.op == "output")
        output.args = ((*output.args[0], *wanted),)
        rewrite(captured, decision.sites, decision.plan)
        wanted = output.args[0][len(output.args[0]) - len(wanted) :]
        head = _cut(captured)
        kept = output.args[0] if head is not None else output.args[0][:1]
        output.args = ((*kept, *wanted),)
        drop_dead(captured.graph)
        captured.module.recompile()
        positions = self._positions
        ordinals = _sites_of(captured, [site.ordinal for site in decision.sites.attention], set())
        layers = tuple(None if o is None else positions.get(o) for o in ordinals)
        found = captured.module, self._inputs, self._slot, layers, head, len(kept), constants.attributes
        return Probe(*found)

    def _refuse_unmade(
        self, sites: Sequence[AttentionSite], pools: Sequence[Pool], tensors: Mapping[str, Tensor]
    ) -> None:
        """Guards training against groups that compiling would leave dense. Raises OptionError."""
        asked = tuple(
            replace(p, anchor=self.ordinals[p.anchor], members=tuple(self.ordinals[m] for m in p.members))
            for p in pools
        )
        _, kept = routed(sites, Request(lambda _: asked, prompts=True, tensors=tensors))
        for ordinal, why in kept.items():
            raise OptionError(f"layer {self.ordinals.index(ordinal)} cannot read an index: it {why}")

    def product(self, layer: int) -> tuple[Tensor, int]:
        """Returns the weight that makes a layer's queries, and the width of what they are made of.

        Raises OptionError where none makes them alone.
        """
        captured = capture(self._source)
        site = next(s for s in decide(captured).sites.attention if s.ordinal == self.ordinals[layer])
        made = product(site)
        if isinstance(made, str):
            raise OptionError(f"an index cannot begin at layer {layer}: {made}")
        numbers = {node: i for i, node in enumerate(n for n in captured.graph.nodes if n.op == "placeholder")}

        def value(node: Node) -> Any:
            if node.op == "get_attr":
                return captured.module.get_buffer(str(node.target))
            if node in numbers:
                return self._inputs[numbers[node]]
            arguments = (value(a) if isinstance(a, Node) else a for a in node.args)
            return node.target(*arguments, **node.kwargs)

        return value(made.weight).detach(), made.rows.meta["val"].shape[-1]


class _Run(Interpreter):
    """Runs a graph node by node, with attention a few rows at a time."""

    def __init__(
        self,
        module: GraphModule,
        layers: Sequence[int | None],
        tap: Tap | None,
        tensors: Mapping[str, Tensor] | None = None,
        index_tap: IndexTap | None = None,
    ) -> None:
        super().__init__(module)
        self._index_tap = index_tap
        self._tensors = tensors or {}
        self._layers = iter(layers)
        self._tap = tap
        self._masks = attend.Masks()

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch._C._set_grad_enabled:
            return None  # the caller has decided
        if args and isinstance(args[0], attend.Mass):
            target = _OF_MASS.get(target, target)
        op = contract_op(target)
        return super().call_function(target, args, kwargs) if op is None else getattr(self, f"_{op}")(*args)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._tensors[target] if target in self._tensors else super().get_attr(target, args, kwargs)

    def _attention(self, *args: Any) -> Any:
        call = self._masks.operands(args)
        return self._seen(call, attend.dense(call), None), None

    def _attention_mass(self, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, *args: Any) -> Any:
        call = self._masks.operands((q, k, v, *args))
        power, among = args[7], attend.Chosen(args[8], k.shape[2]) if len(args) > 8 else None
        out, mass = attend.massed(call, weight, power, among)
        return self._seen(call, out, among), mass

    def _select_topk(self, mass: attend.Mass, _: Any, topk: int, keep_first: int, keep_last: int) -> Tensor:
        return attend.selection(mass, topk, keep_first, keep_last)

    def _sparse_attention(self, q: Tensor, k: Tensor, v: Tensor, tokens: Any, *args: Any) -> Tensor:
        call = self._masks.operands((q, k, v, *args))
        chosen: attend.Tokens
        chosen = attend.Chosen(tokens, k.shape[2]) if isinstance(tokens, Tensor) else tokens
        if len(args) > _WITH_DENSE_BELOW:
            chosen = attend.AllBelow(chosen, call, args[_WITH_DENSE_BELOW])
        return self._seen(call, attend.sparse(call, chosen), chosen)

    def _index_topk(
        self, q: Tensor, k: Tensor, weight: Any, lse: Any, *args: Any
    ) -> Tensor | attend.Readable:
        mask, _, inputs, topk, scale, score, predicate = args[:7]
        call = self._masks.operands((q, k, k, mask, None, inputs, None, scale, 0.0, predicate))
        read = parse_score(score)
        if self._index_tap is not None:
            self._index_tap(call, weight, read)
            return attend.Readable(call)  # an index may say alone what that is
        with torch.no_grad():
            return attend.indexed(call, weight, lse, read, topk)

    def _mask_bounds(self, *_: Any) -> None:
        return None  # a hint that rows do not need

    def _seen(self, call: attend.Operands, out: Tensor, chosen: attend.Tokens | None) -> Tensor:
        number = next(self._layers)
        return out if number is None or self._tap is None else self._tap(number, call, out, chosen)


def _traced(model: Any, ids: Tensor) -> tuple[GraphModule, tuple[Any, ...], int, dict[int, str]]:
    """Returns Dynamo's graph of one forward, its inputs, which of them are the ids, and which are weights."""
    kept: dict[str, Any] = {}

    def keep(module: GraphModule, _: Any, **__: Any) -> Callable[..., Any]:
        def stop(*inputs: Any) -> Any:
            kept["inputs"] = inputs
            raise _Stop

        kept["module"] = module
        return stop

    settings = {"use_cache": False} if _takes(model, "use_cache") else {}
    by_name = _takes(model, "input_ids")

    def call(ids: Tensor) -> Any:
        out = model(input_ids=ids, **settings) if by_name else model(ids, **settings)
        if isinstance(out, Tensor):
            return out
        return out[0] if isinstance(out, tuple) else out.logits

    # Dynamo caches by code object: a code of its own leaves the model's cache alone.
    code = call.__code__.replace(co_name="calibrated")
    fresh = types.FunctionType(code, globals(), "calibrated", None, call.__closure__)
    try:
        with torch.no_grad():
            torch.compile(fresh, backend=keep, fullgraph=True, dynamic=False)(ids)
    except _Stop:
        pass
    except GraphBreak as error:
        reason = str(error).partition("\n")[0]
        raise OptionError(
            f"the model's forward is no single graph, so layers cannot be told what others chose: {reason}"
        ) from error
    if "inputs" not in kept:
        raise OptionError("the model's forward computes nothing that can be captured")
    slots = [i for i, value in enumerate(kept["inputs"]) if value is ids]
    if not slots:
        raise OptionError("the model's forward does not read its first argument as ids")
    named = model.named_parameters() if isinstance(model, torch.nn.Module) else ()
    names = {id(weight): name for name, weight in named}
    weights = {i: names[id(value)] for i, value in enumerate(kept["inputs"]) if id(value) in names}
    inputs = tuple(x.detach() if isinstance(x, Tensor) else x for x in kept["inputs"])
    return kept["module"], inputs, slots[0], weights


def _takes(model: Any, name: str) -> bool:
    return name in inspect.signature(getattr(model, "forward", model)).parameters


def _refuse(attentions: Sequence[Any], able: Sequence[Any]) -> None:
    """Guards a search against models in which there is nothing to find."""
    if len(able) < 2:
        raise OptionError(
            f"{len(able)} of the model's {len(attentions)} attentions that clsa understands are dense over "
            "all tokens, or select by an indexer; to share, it takes 2 at least. clsa_compile.inspect says "
            "what was found"
        )


def _named(entry: Layer, number: int, modules: dict[str, Any]) -> Layer:
    """Returns a layer with its number among those that may share, and its path in the model."""
    pieces = entry.path.split(".")
    endings = (".".join(pieces[i:]) for i in range(len(pieces)))
    path = next((ending for ending in endings if ending in modules), entry.path)
    fields = {name: getattr(entry, name) for name in Layer.__slots__}
    return Layer(**{**fields, "ordinal": number, "path": path})


def _sites_of(captured: Captured, ordinals: Sequence[int], members: set[int]) -> list[int | None]:
    """Returns for each attention op of a rewritten graph the site it came from; sites are in the same order.

    A layer that chooses for itself has two: what measures the mass is None, its output is not used.
    """
    found: list[int | None] = []
    coming = iter(ordinals)
    pending: int | None = None
    for node in captured.graph.nodes:
        op = contract_op(node.target)
        if op not in ("attention", "attention_mass", "sparse_attention"):
            continue
        current = next(coming) if pending is None else pending
        # What is given the tokens to read is the layer itself, which chooses among them.
        twice = op == "attention_mass" and current in members and len(node.args) < _WITH_INDICES
        found.append(None if twice else current)
        pending = current if twice else None
    return found


def _pools(found: Plan, positions: Mapping[int, int]) -> tuple[Pool, ...]:
    """Returns who reads whose tokens by what was decided of a graph; `positions` are its ordinals' layers."""
    own = [
        Pool(group.anchor, group.topk, {}, members)
        for group in found.groups
        if group.kind == "index" and (members := tuple(m for m in group.members if m != group.anchor))
    ]
    return tuple(
        replace(
            pool,
            anchor=positions[pool.anchor],
            members=tuple(positions[m] for m in pool.members),
            sources={positions[layer]: weights for layer, weights in pool.sources.items()},
            rows={positions[layer]: sets for layer, sets in pool.rows.items()},
        )
        for pool in (*own, *found.pools)
    )


def _cut(captured: Captured) -> GraphModule | None:
    """Lets a graph end at the hidden states; returns what makes logits of them and of what it read besides.

    None, and a graph that ends at the logits, where these are not made row by row.
    """
    graph = captured.graph
    output = next(node for node in graph.nodes if node.op == "output")
    chain = _head(output.args[0][0])
    if not chain:
        return None
    read = [a for a in chain[0].args if isinstance(a, Node)]
    head = torch.fx.Graph()
    copies = {node: head.placeholder(node.name) for node in read}
    for node in chain:
        copies[node] = head.node_copy(node, copies.__getitem__)
    head.output(copies[chain[-1]])
    output.args = (tuple(read),)
    for node in reversed(chain):
        graph.erase_node(node)
    captured.module.recompile()
    return GraphModule(torch.nn.Module(), head)


def _head(logits: Any) -> list[Node]:
    """Returns the nodes from the head's product to the logits, none where anything else is among them."""
    chain: list[Node] = []
    node = logits
    while isinstance(node, Node) and len(node.users) == 1:
        chain.insert(0, node)
        if node.target in _PRODUCTS:
            return chain
        if node.target not in _POINTWISE or any(isinstance(a, Node) for a in node.args[1:]):
            return []
        node = node.args[0]
    return []


def fitting(model: Any, ids: Tensor) -> Forward:
    """Captures a model for the length of ids. Raises OptionError, also for graphs that cannot be read."""
    try:
        return Forward(getattr(model, "_orig_mod", model), ids)
    except OptionError:
        raise
    except ClsaError as error:
        raise OptionError(f"the model's forward cannot be captured: {error}") from error

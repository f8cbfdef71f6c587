"""The memory of compiled layers, without compiling them.

``torch.compile`` traces a layer, and splits the graph into a forward and a backward pass such that
few results are kept between them. Both are done here as for a GPU; what the compiler itself would
add, kernels that compute element-wise results where they are read, is taken into account by what
is counted: results that products and other library kernels read or write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from lorakit.planning.tracker import MemoryTracker, Temporary, storage_bytes

#: Operators whose result is a view of their argument.
_VIEWS = (
    "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "expand", "slice", "select",
    "split", "split_with_sizes", "squeeze", "unsqueeze", "as_strided", "alias", "detach", "getitem",
    "unbind",
)  # fmt: skip
#: Element-wise operators that do not say so by a tag.
_FUSED = (
    "convert_element_type", "_to_copy", "full", "full_like", "arange", "cat", "clone", "embedding",
    "constant_pad_nd", "iota", "empty", "where", "expand_as",
)  # fmt: skip


def planned_backend(tracker: MemoryTracker) -> Callable[..., Any]:
    """A backend for ``torch.compile`` whose graphs tell ``tracker`` what the compiled ones need."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    backend: Callable[..., Any] = aot_autograd(
        fw_compiler=partial(_compile, tracker),
        bw_compiler=partial(_compile, tracker),
        inference_compiler=partial(_compile, tracker),
        partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"),
        decompositions=select_decomp_table(),
    )
    return backend


def _compile(tracker: MemoryTracker, graph: fx.GraphModule, _inputs: Any) -> Callable[..., Any]:
    needed = most_in_use(graph.graph, tracker.temporaries)

    def run(arguments: list[Any]) -> Any:
        tracker.use(needed)
        with tracker.uncounted():
            out = graph(*arguments)
        tracker.count(out)
        arguments.clear()
        return out

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def most_in_use(graph: fx.Graph, temporaries: Mapping[str, Temporary]) -> int:
    """The most bytes that a compiled ``graph`` has in use in addition to its inputs. Inputs that
    are its own, as those that a backward pass gets from the forward pass, are freed once read."""
    nodes = list(graph.nodes)
    order = {node: index for index, node in enumerate(nodes)}
    stored = {node for node in nodes if _is_stored(node)}
    last = dict.fromkeys(nodes, 0)
    for node in reversed(nodes):  # users before what they use
        is_read_elsewhere = node not in stored and _is_fused(node) and last[node]
        runs_at = last[node] if is_read_elsewhere else order[node]
        for argument in node.all_input_nodes:
            last[argument] = max(last[argument], runs_at)
    frees: dict[int, int] = {}
    for node in nodes:
        if node in stored or _is_own_input(node):
            frees[last[node]] = frees.get(last[node], 0) + _bytes(node)
    now = most = read = 0
    for index, node in enumerate(nodes):
        if node.op == "call_function" and not _is_fused(node):
            now, read = now - read, 0  # one kernel has computed what was before it
        now += _bytes(node) if node in stored else 0
        most = max(most, now + _temporary(node, temporaries))
        read += frees.get(index, 0)
    return most


def _is_one_of_several(node: fx.Node) -> bool:
    """Whether a node is one of the results of an operator, which has memory of its own."""
    if _name(node) != "getitem":
        return False
    source = node.all_input_nodes[0]
    return isinstance(source.meta.get("val"), list | tuple) and _name(source) not in _VIEWS


def _is_stored(node: fx.Node) -> bool:
    """Whether a result is written to memory: it is that of a library kernel or read by one, or
    leaves the graph."""
    if node.op != "call_function" or isinstance(node.meta.get("val"), list | tuple):
        return False  # of several results, each is
    if _is_one_of_several(node) or not _is_fused(node):
        return True
    if _name(node) in _VIEWS:
        return False
    return any(_reads_memory(user) for user in node.users)


def _reads_memory(node: fx.Node) -> bool:
    if node.op == "output":
        return True
    if _name(node) in _VIEWS:
        return any(_reads_memory(user) for user in node.users)
    return not _is_fused(node)


def _is_fused(node: fx.Node) -> bool:
    """Whether a kernel computes the result where it is read."""
    target: Any = node.target
    name = _name(node)
    return name in _FUSED or name in _VIEWS or torch.Tag.pointwise in getattr(target, "tags", ())


def _is_own_input(node: fx.Node) -> bool:
    return node.op == "placeholder" and not node.name.startswith("primals")


def _name(node: fx.Node) -> str:
    target: Any = node.target
    packet = getattr(target, "_overloadpacket", None)
    return str(getattr(packet or target, "__name__", target)).rpartition(".")[2]


def _bytes(node: fx.Node) -> int:
    return storage_bytes(t for t in tree_leaves(node.meta.get("val")) if isinstance(t, Tensor))


def _temporary(node: fx.Node, temporaries: Mapping[str, Temporary]) -> int:
    packet = str(getattr(node.target, "_overloadpacket", ""))
    if packet not in temporaries:
        return 0
    arguments = tree_map(lambda a: a.meta["val"] if isinstance(a, fx.Node) else a, node.args)
    return temporaries[packet](*arguments)

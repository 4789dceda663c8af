"""Small ggml graphs computed on the processor, over memory that the caller owns."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from types import TracebackType

from edgert.errors import BackendError
from edgert.llama.lib import Handle, LlamaLibrary, tensor_at

_CPU_DEVICE = 0
_SUCCESS = 0
_F32, _I32 = 0, 26


class Processor:
    """ggml's CPU backend with its own number of threads; leave it to free it.

    Args:
        library: The checked libraries.
        n_threads: Threads of every graph.

    Raises:
        BackendError: ggml has no CPU backend, or it takes no number of threads.
    """

    def __init__(self, library: LlamaLibrary, n_threads: int) -> None:
        base = library.base
        self.library = library
        self.n_threads = n_threads
        self.device: int = library.ggml.ggml_backend_dev_by_type(_CPU_DEVICE)
        registry = base.ggml_backend_dev_backend_reg(self.device)
        address = base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
        if not address:
            raise BackendError("ggml's CPU backend takes no number of threads")
        self._backend: Handle = base.ggml_backend_dev_init(self.device, None)
        if not self._backend:
            raise BackendError("ggml cannot start its CPU backend")
        set_n_threads = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)(address)
        set_n_threads(self._backend, n_threads)

    def __enter__(self) -> Processor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the backend."""
        self.library.base.ggml_backend_free(self._backend)

    def supports(self, node: int) -> bool:
        """Say whether the backend computes a node."""
        return bool(self.library.base.ggml_backend_dev_supports_op(self.device, node))

    def compute(self, graph: int) -> None:
        """Compute a graph; BackendError if ggml reports a failure."""
        status = self.library.base.ggml_backend_graph_compute(self._backend, graph)
        if status != _SUCCESS:
            raise BackendError(f"ggml could not compute a graph: status {status}")


class Tensors:
    """A ggml context for tensors without data, and for one graph over them.

    Args:
        library: The checked libraries.
        n_tensors: Room for so many.
    """

    def __init__(self, library: LlamaLibrary, n_tensors: int) -> None:
        self._base = library.base
        self._n_tensors = n_tensors
        self._context = library.new_context(n_tensors, n_graph_nodes=n_tensors)

    def __enter__(self) -> Tensors:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def matrix(self, ggml_type: int, n_columns: int, n_rows: int, address: int | None) -> int:
        """Return a matrix whose bytes lie at `address`."""
        tensor: int = self._base.ggml_new_tensor_2d(self._context, ggml_type, n_columns, n_rows)
        tensor_at(tensor).data = address
        return tensor

    def cube(self, ggml_type: int, shape: tuple[int, int, int], address: int) -> int:
        """Return a tensor of three dimensions whose bytes lie at `address`."""
        tensor: int = self._base.ggml_new_tensor_3d(self._context, ggml_type, *shape)
        tensor_at(tensor).data = address
        return tensor

    def swapped(self, tensor: int) -> int:
        """Return a view with the second and third dimension exchanged."""
        view: int = self._base.ggml_permute(self._context, tensor, 0, 2, 1, 3)
        return view

    def attention(self, query: int, cache: tuple[int, int], mask: int, address: int) -> int:
        """Return the node of flash attention over cached keys and values.

        Args:
            query: f32, head length x tokens x heads.
            cache: Keys and values, head length x cached tokens x cached heads.
            mask: f16, cached tokens x tokens.
            address: Where the result is written.
        """
        scale = float(tensor_at(query).ne[0]) ** -0.5
        node: int = self._base.ggml_flash_attn_ext(
            self._context, query, *cache, mask, scale, 0.0, 0.0
        )
        tensor_at(node).data = address
        return node

    def product(self, weight: int, activations: int, address: int) -> int:
        """Return the node that multiplies; its result is written to `address`."""
        node: int = self._base.ggml_mul_mat(self._context, weight, activations)
        tensor_at(node).data = address
        return node

    def routed_product(self) -> tuple[int, int, int, int]:
        """Return activations, ids, a node that multiplies by id, and the graph of that node.

        Shapes, memory and the weight are for the caller to set before each computation.
        """
        weight = self._base.ggml_new_tensor_3d(self._context, _F32, 1, 1, 1)
        activations = self._base.ggml_new_tensor_3d(self._context, _F32, 1, 1, 1)
        ids = self._base.ggml_new_tensor_2d(self._context, _I32, 1, 1)
        node = self._base.ggml_mul_mat_id(self._context, weight, activations, ids)
        return activations, ids, node, self.graph([node])

    def close(self) -> None:
        """Free the context."""
        self._base.ggml_free(self._context)

    def sum(self, left: int, right: int, address: int) -> int:
        """Return the node that adds two equal shapes; its result is written to `address`."""
        node: int = self._base.ggml_add(self._context, left, right)
        tensor_at(node).data = address
        return node

    def graph(self, nodes: Sequence[int]) -> int:
        """Return the graph of these nodes, in this order; one a context."""
        graph: int = self._base.ggml_new_graph_custom(self._context, self._n_tensors, False)
        for node in nodes:
            self._base.ggml_build_forward_expand(graph, node)
        return graph

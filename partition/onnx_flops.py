"""Operations of one ONNX node, from its shapes: two a multiply-add, one an element otherwise.

Products and convolutions are exact. Everything elementwise counts one operation a result (or an
input, for reductions), however costly; normalisations and softmax a few. They are a rounding error
beside products and decide nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

from partition.onnx_model import OnnxNode

Shape = tuple[int, ...]
Shapes = Sequence[Shape | None]  # of inputs or outputs; None for unknown and omitted ones


class UnknownWork(Exception):
    """The operations of a node cannot be counted; says why."""


# Only rename, move, or make; no arithmetic.
MOVES = frozenset(
    {"BitCast", "Cast", "CastLike", "CenterCropPad", "Compress", "Concat", "ConcatFromSequence"}
    | {"Constant", "ConstantOfShape", "Crop", "DepthToSpace", "Dropout", "Expand", "EyeLike"}
    | {"Flatten", "Gather", "GatherElements", "GatherND", "Identity", "NonZero", "OneHot"}
    | {"Optional", "OptionalGetElement", "OptionalHasElement", "Pad", "Range", "Reshape"}
    | {"ReverseSequence", "Scatter", "ScatterElements", "ScatterND", "SequenceAt"}
    | {"SequenceConstruct", "SequenceEmpty", "SequenceInsert", "SequenceLength", "Shape", "Size"}
    | {"Slice", "SpaceToDepth", "Split", "SplitToSequence", "Squeeze", "TensorScatter", "Tile"}
    | {"Transpose", "Trilu", "Unsqueeze", "Upsample", "Where", "ZipMap"}
)  # fmt: skip
# Operations an element of the result.
_PER_RESULT = {
    "BatchNormalization": 2, "InstanceNormalization": 5, "LayerNormalization": 5,
    "GroupNormalization": 5, "RMSNormalization": 4, "LpNormalization": 3,
    "MeanVarianceNormalization": 5, "SkipLayerNormalization": 6, "EmbedLayerNormalization": 7,
    "SimplifiedLayerNormalization": 4, "SkipSimplifiedLayerNormalization": 5,
    "Softmax": 3, "LogSoftmax": 4, "Hardmax": 1, "LRN": 5, "RotaryEmbedding": 3,
    "Resize": 4, "GridSample": 8, "RoiAlign": 8, "MaxRoiPool": 1, "QLinearAdd": 3, "QLinearMul": 3,
    "QLinearSigmoid": 3, "QLinearLeakyRelu": 3, "Normalizer": 3, "Scaler": 2,
}  # fmt: skip
# One an element of the result.
_ELEMENTWISE = frozenset(
    {"Abs", "Acos", "Acosh", "Add", "Affine", "And", "ArrayFeatureExtractor", "Asin", "Asinh"}
    | {"Atan", "Atanh", "Bernoulli", "BiasGelu", "Binarizer", "BitShift", "BitwiseAnd"}
    | {"BitwiseNot", "BitwiseOr", "BitwiseXor", "Ceil", "Celu", "Clip", "Cos", "Cosh", "CumProd"}
    | {"CumSum", "DequantizeLinear", "Det", "Div", "DynamicQuantizeLinear", "Elu", "Equal", "Erf"}
    | {"Exp", "FastGelu", "FeatureVectorizer", "Floor", "Gelu", "Greater", "GreaterOrEqual"}
    | {"HardSigmoid", "HardSwish", "ImageScaler", "Imputer", "IsInf", "IsNaN", "LeakyRelu"}
    | {"Less", "LessOrEqual", "Log", "Max", "Mean", "Min", "Mish", "Mod", "Mul", "Neg", "Not"}
    | {"Or", "PRelu", "ParametricSoftplus", "Pow", "QuantizeLinear", "QuickGelu", "RandomNormal"}
    | {"RandomNormalLike", "RandomUniform", "RandomUniformLike", "Reciprocal", "Relu", "Round"}
    | {"ScaledTanh", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign"}
    | {"Sqrt", "Sub", "Sum", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Xor"}
)  # fmt: skip
# One an element of the first input.
_REDUCTIONS = ("Reduce", "Arg", "Global", "TopK", "Unique", "NonMaxSuppression")


def node_flops(node: OnnxNode, inputs: Shapes, outputs: Shapes) -> int:
    """Count the operations of one node without subgraphs.

    Args:
        node: The node.
        inputs: Shapes of its inputs, in order.
        outputs: Shapes of its results, in order.

    Raises:
        UnknownWork: a shape is missing, or there is no rule for the operation.
    """
    name = node.op_type
    if name in MOVES:
        return 0
    if name in _RULES:
        return _RULES[name](node, _Shapes(node, inputs, outputs))
    shapes = _Shapes(node, inputs, outputs)
    if name in _PER_RESULT:
        return _PER_RESULT[name] * prod(shapes.output(0))
    if name in _ELEMENTWISE:
        return prod(shapes.output(0))
    if name.startswith(_REDUCTIONS):
        return prod(shapes.input(0))
    raise UnknownWork(f"no rule for {name}" + (f" of {node.domain}" if node.domain else ""))


class _Shapes:
    """Shapes of a node; asking for one that is not known raises."""

    def __init__(self, node: OnnxNode, inputs: Shapes, outputs: Shapes) -> None:
        self._node = node
        self._inputs = inputs
        self._outputs = outputs

    def input(self, index: int, rank: int = 0) -> Shape:
        return self._get("input", self._inputs, self._node.inputs, index, rank)

    def output(self, index: int, rank: int = 0) -> Shape:
        return self._get("result", self._outputs, self._node.outputs, index, rank)

    def has_input(self, index: int) -> bool:
        return index < len(self._node.inputs) and bool(self._node.inputs[index])

    def _get(self, kind: str, shapes: Shapes, names: Sequence[str], index: int, rank: int) -> Shape:
        if index >= len(shapes):
            raise UnknownWork(f"{self._node.op_type} without {kind} {index}")
        shape = shapes[index]
        if shape is None:
            raise UnknownWork(f"shape of {kind} {names[index]!r} is unknown")
        if len(shape) < rank:
            raise UnknownWork(f"{kind} {names[index]!r} has shape {shape}, wanted rank {rank}")
        return shape


def _conv(_node: OnnxNode, shapes: _Shapes, weight: int = 1, bias: int = 2) -> int:
    """Each result is a dot product over the kernel and the channels of its group."""
    n_results = prod(shapes.output(0))
    added = n_results if shapes.has_input(bias) else 0
    return 2 * n_results * prod(shapes.input(weight, 3)[1:]) + added


def _conv_transpose(_node: OnnxNode, shapes: _Shapes) -> int:
    """Each input element is spread over the kernel and the channels of its group."""
    added = prod(shapes.output(0)) if shapes.has_input(2) else 0
    return 2 * prod(shapes.input(0)) * prod(shapes.input(1, 3)[1:]) + added


def _deform_conv(node: OnnxNode, shapes: _Shapes) -> int:
    return _conv(node, shapes, 1, 3)


def _matmul(_node: OnnxNode, shapes: _Shapes, first: int = 0) -> int:
    return 2 * prod(shapes.output(0)) * shapes.input(first, 1)[-1]


def _fused_matmul(node: OnnxNode, shapes: _Shapes) -> int:
    axis = -2 if node.integer("transA", 0) else -1
    return 2 * prod(shapes.output(0)) * shapes.input(0, 2)[axis]


def _gemm(node: OnnxNode, shapes: _Shapes) -> int:
    inner = shapes.input(0, 2)[0 if node.integer("transA", 0) else 1]
    n_results = prod(shapes.output(0))
    return 2 * n_results * inner + (n_results if shapes.has_input(2) else 0)


def _recurrent(node: OnnxNode, shapes: _Shapes) -> int:
    """For each step and sequence: input and recurrent weights, (directions, gates x hidden, n)."""
    steps = shapes.input(0, 3)[0] * shapes.input(0, 3)[1]
    products = 2 * (prod(shapes.input(1, 3)) + prod(shapes.input(2, 3)))
    directions, _, hidden = shapes.input(2, 3)[:3]
    elementwise = {"LSTM": 9, "GRU": 8}.get(node.op_type, 1) * directions * hidden
    return steps * (products + elementwise)


def _einsum(node: OnnxNode, shapes: _Shapes) -> int:
    equation = node.attributes.get("equation")
    if not isinstance(equation, str) or "." in equation:
        raise UnknownWork("an Einsum without plain letters")
    lengths: dict[str, int] = {}
    for index, term in enumerate(equation.replace(" ", "").split("->")[0].split(",")):
        shape = shapes.input(index)
        if len(shape) != len(term):
            raise UnknownWork(f"Einsum {equation!r} with shape {shape}")
        for letter, length in zip(term, shape, strict=True):
            lengths[letter] = max(length, lengths.get(letter, 0))
    return 2 * prod(lengths.values())


def _pool(node: OnnxNode, shapes: _Shapes) -> int:
    return prod(shapes.output(0)) * prod(node.integers("kernel_shape"))


def _attention(_node: OnnxNode, shapes: _Shapes) -> int:
    """(batch, heads, tokens, width) queries, keys, values; scores and their mix of values."""
    query, key, value = shapes.input(0), shapes.input(1), shapes.input(2)
    if len(query) < 3 or len(key) < 3 or len(value) < 3:
        raise UnknownWork("attention without three or four dimensions")
    # With three dimensions the last one holds all heads: the product over heads is the same.
    rows = prod(query[:-1])
    past = shapes.input(4)[-2] if shapes.has_input(4) else 0
    return 2 * rows * (key[-2] + past) * (query[-1] + value[-1])


def _contrib_attention(_node: OnnxNode, shapes: _Shapes) -> int:
    """Of com.microsoft: one weight for queries, keys and values; then scores over past and new."""
    batch, tokens = shapes.input(0, 3)[:2]
    weight = shapes.input(1, 2)
    hidden = shapes.output(0)[-1]
    past = shapes.input(4, 5)[3] if shapes.has_input(4) else 0
    return 2 * batch * tokens * prod(weight) + 4 * batch * tokens * (tokens + past) * hidden


def _head_attention(_node: OnnxNode, shapes: _Shapes) -> int:
    """Of com.microsoft: (batch, tokens, hidden) queries; cached keys count too."""
    query = shapes.input(0, 3)
    cached = 3 if _node.op_type == "GroupQueryAttention" else 6
    past = shapes.input(cached, 4)[-2] if shapes.has_input(cached) else 0
    seen = past + (shapes.input(1, 3)[1] if shapes.has_input(1) else query[1])
    return 4 * prod(query[:2]) * seen * shapes.output(0)[-1]


def _bits_matmul(node: OnnxNode, shapes: _Shapes) -> int:
    n_rows = prod(shapes.input(0, 1)[:-1])
    columns, inner = node.integer("N", 0), node.integer("K", 0)
    if columns <= 0 or inner <= 0:
        raise UnknownWork("MatMulNBits without N and K")
    return 2 * n_rows * columns * inner


_RULES: Mapping[str, Callable[[OnnxNode, _Shapes], int]] = {
    "Conv": _conv,
    "ConvInteger": lambda node, shapes: _conv(node, shapes, 1, 99),
    "QLinearConv": lambda node, shapes: _conv(node, shapes, 3, 8),
    "FusedConv": _conv,
    "ConvTranspose": _conv_transpose,
    "DeformConv": _deform_conv,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "MatMulIntegerToFloat": _matmul,
    "DynamicQuantizeMatMul": _matmul,
    "QLinearMatMul": _matmul,
    "FusedMatMul": _fused_matmul,
    "MatMulNBits": _bits_matmul,
    "Gemm": _gemm,
    "FusedGemm": _gemm,
    "QGemm": _gemm,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
    "Einsum": _einsum,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "LpPool": _pool,
    "QLinearAveragePool": _pool,
    "Attention": lambda node, shapes: (
        _contrib_attention(node, shapes) if node.domain else _attention(node, shapes)
    ),
    "QAttention": _contrib_attention,
    "MultiHeadAttention": _head_attention,
    "GroupQueryAttention": _head_attention,
}

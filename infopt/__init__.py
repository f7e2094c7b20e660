"""infopt: composable inference transforms for language models, in JAX."""

from infopt import models
from infopt.cache import State, rollback
from infopt.errors import InfoptError, TransformOrderError
from infopt.generate import Chunk, Generation, generate, stream
from infopt.io import load
from infopt.model import Emitted, Model, define, trainable
from infopt.qtensor import Format, QTensor
from infopt.sampling import Sampling
from infopt.spec import Config, Spec, Window, oracle
from infopt.transforms import (
    Transform,
    cache_kv,
    compose,
    dequantize,
    gqa,
    paged,
    parse_stack,
    quantize,
    self_draft,
    sliding_window,
    speculative,
)

__version__ = "0.1.0"

"""Training: text to tokens, the loop, checkpoints that resume bit-exactly, logs."""

from nestlearn.sources import find_sources, read_documents
from nestlearn.train.checkpoint import list_checkpoints, load_weights, save_model
from nestlearn.train.config import TrainConfig
from nestlearn.train.data import Blocks, Corpus, prepare
from nestlearn.train.distributed import Distributed
from nestlearn.train.logging import read_log
from nestlearn.train.loop import Trainer, TrainingStopped, TrainResult
from nestlearn.train.progress import Progress
from nestlearn.train.tokenizers import ByteTokenizer, load_tokenizer, token_bytes, train_bpe

__all__ = [
    "Blocks",
    "ByteTokenizer",
    "Corpus",
    "Distributed",
    "Progress",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "TrainingStopped",
    "find_sources",
    "list_checkpoints",
    "load_tokenizer",
    "load_weights",
    "prepare",
    "read_documents",
    "read_log",
    "save_model",
    "token_bytes",
    "train_bpe",
]

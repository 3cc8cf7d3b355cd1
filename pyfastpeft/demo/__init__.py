"""The offline demo: a small base model made from, and tuned on, text that every CPython carries."""

from pathlib import Path

from pyfastpeft.demo.corpus import CorpusError, PydocDataMissingError, english_text, python_source

#: Folder of the shipped base model (Hugging Face layout): a byte-level Llama and ByT5's tokenizer.
MODEL_DIRECTORY = Path(__file__).resolve().parent / "model"

__all__ = ["MODEL_DIRECTORY", "CorpusError", "PydocDataMissingError", "english_text", "python_source"]

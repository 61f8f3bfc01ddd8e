"""Names on the Hugging Face hub to verified local files."""

from gemma2.hub.folders import download, download_adapter, download_tokenizer
from gemma2.hub.gguf_files import download_gguf

__all__ = ["download", "download_adapter", "download_gguf", "download_tokenizer"]

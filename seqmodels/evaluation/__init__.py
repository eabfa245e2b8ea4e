"""Measuring trained language models on text: ours and Hugging Face's through one protocol (:mod:`.text_model`)."""

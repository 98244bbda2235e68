"""An OpenAI-compatible server over transformers, for machines without vLLM."""

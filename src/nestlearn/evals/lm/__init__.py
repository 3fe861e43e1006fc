"""Standard language-model tasks through lm-eval: backend, local data sets, measuring."""

//! Model checkpoints on disk: safetensors and Hugging Face directories, Orbax.

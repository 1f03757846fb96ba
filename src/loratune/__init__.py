"""loratune finds the batch size and learning rate that train a LoRA adapter best."""

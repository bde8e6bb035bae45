from moe_jax.commands import train_tokenizer

if __name__ == "__main__":
    train_tokenizer.main()

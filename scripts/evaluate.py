from moe_jax.commands import evaluate

if __name__ == "__main__":
    evaluate.main()

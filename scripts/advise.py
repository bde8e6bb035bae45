from moe_jax.commands import advise

if __name__ == "__main__":
    advise.main()

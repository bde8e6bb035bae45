from moe_jax import __main__ as entry

if __name__ == "__main__":
    entry.run("results")

from moe_jax.commands import benchmark

if __name__ == "__main__":
    benchmark.main()

from moe_jax.commands import collect_statistics

if __name__ == "__main__":
    collect_statistics.main()

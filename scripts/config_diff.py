from moe_jax.commands import config_diff

if __name__ == "__main__":
    config_diff.main()

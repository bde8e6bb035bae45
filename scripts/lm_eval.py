from moe_jax.commands import lm_eval

if __name__ == "__main__":
    lm_eval.main()

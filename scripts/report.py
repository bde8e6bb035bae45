from moe_jax.commands import report

if __name__ == "__main__":
    report.main()

from moe_jax.commands import doctor

if __name__ == "__main__":
    doctor.main()

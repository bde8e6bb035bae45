"""Pages and figures of what is in workdirs."""

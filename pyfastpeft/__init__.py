"""pyfastpeft: parameter-efficient fine-tuning at the speed of the hardware."""

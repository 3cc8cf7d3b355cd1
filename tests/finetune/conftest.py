from tiny_job import copied_model, make_config, one_thread, text_file, tiny_model  # noqa: F401

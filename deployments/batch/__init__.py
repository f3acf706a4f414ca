"""Batch jobs: data sets answered under routed adapters by Ray Data, without a service.

`pipeline.answer_dataset` works on a `ray.data.Dataset`; `job.run_job` from files to files, and can be resumed.
"""

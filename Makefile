.DEFAULT_GOAL := help
.PHONY: help prepare test site preview bench clean

help:     ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

prepare:  ## notebooks to package, README and runnable pages, then the checks that they are in step
	nbdev_export
	python .ci/make_pages.py
	python .ci/make_readme.py
	nbdev_clean
	bash .ci/sync

test:     ## all tests: every notebook and .ci/tests
	bash .ci/test

site:     ## the documentation, checked without Quarto
	python .ci/site

preview:  ## the documentation at http://localhost:8000
	python .ci/site --serve

bench:    ## seconds of audio a second, and what a start costs
	python benchmarks/loader.py
	python benchmarks/startup.py

clean:    ## what was built; runs stay
	rm -rf _docs _proc build dist .pytest_cache .ruff_cache .hypothesis

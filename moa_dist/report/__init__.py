"""Reports on a run, or several compared, as one offline HTML page of at most 1.5 MB.

Why our own SVG: plotly.js is 4.8 MB, Bokeh 1.3 MB before data, and neither they nor Vega show
anything without scripts.
"""

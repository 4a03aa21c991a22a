-- wrk's request and report for the path without a model: POST /infer, and the figures as one line of JSON.
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
if os.getenv("TETHER_BENCH_KEY") then
  wrk.headers["Authorization"] = "Bearer " .. os.getenv("TETHER_BENCH_KEY")
end
wrk.body = '{"tenantId":"bench","modelId":"demo","version":"1.0","input":"tokens=1"}'

function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    'RESULT {"requests":%d,"seconds":%.3f,"failed":%d,"p50_ms":%.3f,"p90_ms":%.3f,"p99_ms":%.3f}\n',
    summary.requests, summary.duration / 1e6,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout,
    latency:percentile(50) / 1e3, latency:percentile(90) / 1e3, latency:percentile(99) / 1e3))
end

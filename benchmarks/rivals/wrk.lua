-- Sends whole requests in turn and prints the figures as a last line of JSON: wrk ... -s wrk.lua URL -- FILE
-- FILE holds each request behind a line with its length in bytes.
local requests, at = {}, 0

function init(arguments)
  local file = assert(io.open(arguments[1], "rb"))
  for length in function() return file:read("*n") end do
    file:read(1)
    requests[#requests + 1] = file:read(length)
  end
  file:close()
end

function request()
  at = at % #requests + 1
  return requests[at]
end

function done(summary, latency)
  local errors = summary.errors
  print(string.format(
    '{"requests": %d, "seconds": %f, "p50_ms": %f, "p99_ms": %f, "status": %d, "timeout": %d, "socket": %d}',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.status, errors.timeout, errors.connect + errors.read + errors.write
  ))
end

-- Dovecot's Lua passdb (2.3 and 2.4), as a client of the authenticator.
--
-- Dovecot loads a file of the operator's, in which the global bascule_socket
-- is the path of the authenticator's socket, and which then runs this one (see
-- config_templates/dovecot/passdb.lua.j2). The passdb must run in auth's worker
-- processes, for the authenticator may take a while to answer.
--
-- What is said on the socket is in hooks/protocol.py: netstrings of fields that
-- end at a NUL. The password is written there and nowhere else. A script that
-- fails is an internal failure to Dovecot: a temporary one to the user.

local connect = require "socket.unix"
local sleep = require "socket".sleep

local TIMEOUT = 60 -- seconds; the authenticator answers sooner by itself
-- Postfix (3.7 to 3.10) tells a client "wrong password" (535) when Dovecot says that it cannot say now, and the
-- truth (454) when Dovecot says nothing for ten seconds.
local SILENCE_FOR_POSTFIX = 12 -- seconds

local function ask(...)
  local payload = table.concat({...}, "\0")
  local connection = assert(connect())
  connection:settimeout(TIMEOUT)
  assert(connection:connect(bascule_socket))
  assert(connection:send(#payload .. ":" .. payload .. ","))
  local answer = assert(connection:receive("*a"))
  connection:close()
  local length, reply = answer:match("^(%d+):(.*),$")
  if not reply or #reply ~= tonumber(length) then
    error("half an answer")
  end
  return reply
end

local function fields_of(reply)
  local fields = {}
  for name, value in reply:gmatch("%z([^=%z]+)=([^%z]*)") do
    fields[name] = value
  end
  return fields
end

local RESULTS = {
  refused = dovecot.auth.PASSDB_RESULT_PASSWORD_MISMATCH,
  unknown = dovecot.auth.PASSDB_RESULT_USER_UNKNOWN,
}

function auth_password_verify(request, password)
  local service = request.protocol or request.service or ""
  local answered, reply = pcall(ask, request.user, password, service, request.remote_ip or request.rip or "")
  if not answered then
    dovecot.i_error("bascule: the authenticator does not answer: " .. tostring(reply))
    reply = "temporary"
  end
  local result = reply:match("^[^%z]*")
  if result == "ok" then
    return dovecot.auth.PASSDB_RESULT_OK, fields_of(reply)
  end
  if not RESULTS[result] and service == "smtp" then
    sleep(SILENCE_FOR_POSTFIX)
  end
  return RESULTS[result] or dovecot.auth.PASSDB_RESULT_INTERNAL_FAILURE, result
end

-- A password that is not given cannot be checked at the legacy server.
function auth_passdb_lookup(_)
  return dovecot.auth.PASSDB_RESULT_USER_UNKNOWN, "no lookup without a password"
end

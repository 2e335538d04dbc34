// .NET's own NegotiateStream as a server, for bench/negotiate.py: a thread for each connection, which is what costs it least.
//
// usage: NegotiateServer sink|source|echo|handshake
using System;
using System.IO;
using System.Net;
using System.Net.Security;
using System.Net.Sockets;
using System.Security.Principal;
using System.Threading;

static class NegotiateServer
{
    const int Chunk = 256 * 1024;

    static void Main(string[] words)
    {
        var listener = new TcpListener(IPAddress.Loopback, 0);
        listener.Start(1024);
        Console.WriteLine("READY " + ((IPEndPoint)listener.LocalEndpoint).Port);
        Console.Out.Flush();
        while (true)
        {
            var client = listener.AcceptTcpClient();
            client.NoDelay = true;
            new Thread(() => Serve(client, words[0])) { IsBackground = true }.Start();
        }
    }

    static void Serve(TcpClient client, string mode)
    {
        try
        {
            using (var stream = new NegotiateStream(client.GetStream(), false))
            {
                stream.AuthenticateAsServer(
                    CredentialCache.DefaultNetworkCredentials,
                    ProtectionLevel.EncryptAndSign,
                    TokenImpersonationLevel.Identification);
                if (mode == "source")
                    Pour(stream);
                else
                    Take(stream, mode == "echo");
            }
        }
        catch (IOException)
        {
            // The client leaves in the midst of a stream.
        }
    }

    static void Take(Stream stream, bool echo)
    {
        var buffer = new byte[Chunk];
        int count;
        while ((count = stream.Read(buffer, 0, buffer.Length)) > 0)
            if (echo)
                stream.Write(buffer, 0, count);
    }

    static void Pour(Stream stream)
    {
        var buffer = new byte[Chunk];
        stream.Read(buffer, 0, 1);
        while (true)
            stream.Write(buffer, 0, buffer.Length);
    }
}
